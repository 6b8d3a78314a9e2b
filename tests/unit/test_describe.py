"""The lines at a run's start say what it will do."""

from __future__ import annotations

import shlex

import pytest

from paci_megatron.config import Extra, PaciConfig
from paci_megatron.plugin.describe import describe
from paci_megatron.plugin.run_header import launch_command
from paci_megatron.schedule.vee import fold


@pytest.mark.parametrize(
    ("policy", "weights"),
    [
        ("latest", "one copy of the weights"),
        ("stash", "the weights and up to 2 older versions of them (--paci-weight-policy stash)"),
        ("double-buffer", "the weights and one older version of them (--paci-weight-policy double-buffer)"),
    ],
)
def test_memory_names_the_copies_of_weights_that_there_are(policy: str, weights: str) -> None:
    _, memory, _ = describe(PaciConfig(4, weight_policy=policy), 0.0, microbatches_per_update=2)
    assert memory == f"memory: activations of up to 4 micro-batches in flight (by stage: 4 3 2 1); {weights}"


def test_a_look_ahead_is_by_the_mean_drift() -> None:
    lines = describe(PaciConfig(4, look_ahead=True), 0.0, microbatches_per_update=4)
    assert lines[2] == "look-ahead: forwards with the weights expected after so many more updates, by stage: 0.75 0.5 0.25 0"


def test_schedule_and_clipping() -> None:
    schedule, memory, clipping = describe(PaciConfig(4, clip_mode="global", slack=(1, 1, 1)), 1.0, 2)
    assert schedule == "schedule paci: 4 stages, 2 micro-batches per update, drift of at most 3 updates (by stage: 3 2 1 0)"
    assert "7 instead of 4 at the first stage" in memory
    assert clipping.startswith("clipping: to 1, by the global norm of 4 updates ago")
    assert describe(PaciConfig(2, schedule="1f1b", stages_per_process=2), 0.0, 4) == [
        "schedule 1f1b: 2 stages emulated in one process, 4 micro-batches per update",
        "clipping: none",
    ]


def test_auto_says_when_it_chooses_and_what_bounds_it() -> None:
    line = describe(PaciConfig(4, extra=Extra(((0, (0, 0, 0)),), most=4, is_auto=True)), 0.0, 2)[-1]
    assert line.startswith("--paci-extra-in-flight auto: after 12 updates the pipeline drains once")
    assert line.endswith("at most 8 micro-batches in flight at the first stage, drift of at most 4 updates")
    bytes_too = Extra(((0, (0, 0, 0)),), most=4, is_auto=True, most_bytes=12_500_000_000)
    line = describe(PaciConfig(4, extra=bytes_too), 0.0, 2)[-1]
    assert line.endswith("in flight at the first stage with 12.5 GB of activations, drift of at most 4 updates")


def test_a_v() -> None:
    folded = fold(4)
    config = PaciConfig(8, schedule="paci-v", stages_per_process=2, slack=folded.slack, folded=folded)
    schedule, memory, _ = describe(config, 0.0, 4)
    assert schedule.startswith("schedule paci-v: 8 stages on 4 processes, 4 micro-batches per update, drift of at most 1")
    assert ", which is at most 3 on a whole process, where 1F1B-flush has 4; one copy" in memory


def test_a_metrics_file_names_the_command_that_starts_the_run_again() -> None:
    program = ["-m", "pretrain_gpt_paci", "--lr", "1e-3", "--data-path", "a b"]
    argv = ["/usr/bin/python3", "-u", *program]
    told = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8"}
    alone = launch_command(argv, told | {"WORLD_SIZE": "8"})
    assert shlex.split(alone) == ["torchrun", "--nproc-per-node", "8", *program]
    several = launch_command(argv, told | {"WORLD_SIZE": "32"})
    assert shlex.split(several) == ["torchrun", "--nnodes", "4", "--nproc-per-node", "8", *program]
    assert shlex.split(launch_command(argv, {})) == ["python", *program]
