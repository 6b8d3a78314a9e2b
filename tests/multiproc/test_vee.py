"""Processes of a V, each with two half-size stages, are their stages emulated in one process, bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci_megatron.schedule.vee import fold
from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_weights, slow
from tests.support.interruptions import Injection
from tests.support.jobs import TrainingResult

V = ["--pipeline-schedule", "paci-v"]


def v_of(corpus: str, num_stages: int, a: int, *more: str, **settings: Any) -> list[str]:
    """A V of so many processes, each of two stages with a layer or more."""
    layers = ["--num-layers", str(2 * num_stages)]
    return [*arguments(corpus, num_stages, a, *layers, *more, **settings)]


def of_stages(argv: list[str]) -> list[str]:
    """The same training with all 2N stages in one process."""
    at = argv.index("--pipeline-model-parallel-size")
    return [*argv[:at], *argv[at + 2 :], "--paci-emulate-stages", str(2 * int(argv[at + 1]))]


def assert_same(processes: list[TrainingResult], one: TrainingResult) -> None:
    """Losses and evaluations are on the last rank, which has the ends of the V; stages go down from there and up again."""
    assert one.losses and len(one.evaluations) >= 2
    assert processes[-1].evaluations == one.evaluations
    assert np.array_equal(processes[-1].losses, one.losses, equal_nan=True)
    first = [process.stage_weights[0] for process in reversed(processes)]
    assert_same_weights([*first, *(process.stage_weights[1] for process in processes)], one.stage_weights)


TENSOR = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]
EXPERTS = ("--num-experts", "4", "--moe-router-topk", "2", "--disable-bias-linear")
OVERLAPPED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--ddp-bucket-size", "4000")
TIED = "--untie-embeddings-and-output-weights"


@pytest.mark.parametrize(
    ("num_stages", "a", "order"), [(2, 3, "1:2:0"), *slow((2, 1, "1:2:0"), (4, 2, "1:2:0"), (4, 3, "2:3:1"))]
)
def test_processes_of_a_v_are_emulated_stages(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int, order: str
) -> None:
    argv = [*v_of(corpus, num_stages, a, "--clip-grad", "0.5"), *V, "--paci-v-order", order]
    argv.remove(TIED)
    processes = pool(num_stages).run("train", argv=argv, count_collectives=True)
    assert_same(processes, one_process(of_stages(argv)))
    assert [process.collectives for process in processes] == [{}] * num_stages, (
        "between drains no collective of two processes"
    )


@pytest.mark.parametrize(("num_stages", "a"), [(2, 3), *slow((4, 2))])
def test_drain_at_every_update_is_the_flush_of_as_many_stages(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int
) -> None:
    """Emulated stages under 1F1B-flush are Megatron's own on 2N processes: test_emulation.py."""
    argv = v_of(corpus, num_stages, a)
    drained = pool(num_stages).run("train", argv=[*argv, *V, "--paci-drain-interval", "1"])
    assert_same(drained, one_process(of_stages(argv)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        EXPERTS,
        ("--paci-weight-policy", "stash"),
        ("--paci-weight-policy", "double-buffer"),
        ("--bf16", "--paci-look-ahead"),
        ("--bf16", "--optimizer", "muon"),
        ("--position-embedding-type", "rope", "--mtp-num-layers", "1"),
        ("--paci-start-iteration", "3"),
        ("--recompute-activations",),
        ("--pipeline-model-parallel-layout", "Et|t|ttt|L", "--num-layers", "5"),
    ],
    ids=lambda more: more[0].lstrip("-") if more[0] != "--bf16" else more[1].lstrip("-"),
)
def test_other_models_and_options(pool: GetPool, corpus: str, one_process: OneProcess, more: tuple[str, ...]) -> None:
    argv = [*v_of(corpus, 2, 3, *more), *V]
    assert_same(pool(2).run("train", argv=argv), one_process(of_stages(argv)))


@pytest.mark.parametrize("num_stages", [2])
def test_a_window_that_is_not_finite(pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int) -> None:
    injection = Injection(stage=2, microbatch=4, factor=math.nan, backward=True)
    checks_off = ["--no-check-for-nan-in-loss-and-grad", "--clip-grad", "0.5", "--paci-fallback", "2"]
    argv = [*v_of(corpus, num_stages, 2, *checks_off), *V]
    argv.remove(TIED)
    processes = pool(num_stages).run("train", argv=argv, within=injection)
    one = one_process(of_stages(argv), within=injection)
    assert_same(processes, one)
    assert sum(one.skipped) > 0 and processes[-1].skipped == processes[0].skipped


@pytest.mark.parametrize("num_stages", [2])
def test_a_run_says_what_its_stages_do_and_holds_less_than_paci(
    pool: GetPool, corpus: str, tmp_path: Path, num_stages: int
) -> None:
    """With twice as many micro-batches per update as are in flight, so that every stage gets as far as it can."""
    argv, metrics, traces = v_of(corpus, num_stages, 6, iters=4), tmp_path / "metrics.jsonl", tmp_path / "traces"
    workers = pool(num_stages)
    told = ["--paci-metrics-file", str(metrics), "--paci-trace-dir", str(traces)]
    workers.run("train", argv=[*argv, *V, *told])
    folded = fold(num_stages)
    (drain,) = [event for event in read_metrics(metrics) if event["event"] == "drain"]
    assert [stage["stage_index"] for stage in drain["stages"]] == list(range(2 * num_stages))
    assert [stage["max_in_flight"] for stage in drain["stages"]] == [folded.in_flight(s) for s in range(2 * num_stages)]
    assert len(list(traces.iterdir())) == 2 * num_stages
    losses = [event["loss"] for event in read_metrics(metrics) if event["event"] == "train"]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("num_stages", [2])
def test_checkpoints_are_megatrons_of_as_many_stages(
    pool: GetPool, corpus: str, one_process: OneProcess, tmp_path: Path, num_stages: int
) -> None:
    """Saved half-way, and gone on from under V, and under Megatron's flush and PACI on other numbers of stages."""
    resumable = ["--save-interval", "3", "--override-opt-param-scheduler"]
    argv = v_of(corpus, num_stages, 2, *resumable)
    workers, folder = pool(num_stages), str(tmp_path / "half")
    whole = workers.run("train", argv=[*argv, *V, "--save", str(tmp_path / "whole")])
    half = v_of(corpus, num_stages, 2, *resumable, iters=3)
    stopped = workers.run("train", argv=[*half, *V, "--save", folder])
    assert stopped[-1].losses == whole[-1].losses[:3]
    resumed = workers.run("train", argv=[*argv, *V, "--load", folder])
    assert resumed[-1].losses == whole[-1].losses[3:] and resumed[-1].evaluations == whole[-1].evaluations
    for chunk in (0, 1):
        assert_same_weights([r.stage_weights[chunk] for r in resumed], [r.stage_weights[chunk] for r in whole])
    emulated = [*of_stages(argv), *V, "--load", folder]
    assert_same(resumed, one_process(emulated))


@pytest.mark.parametrize("num_stages", [2])
def test_checkpoints_load_at_any_size(pool: GetPool, corpus: str, tmp_path: Path, num_stages: int) -> None:
    """Without dropout a flush computes the same on any number of stages."""
    off = ["--attention-dropout", "0", "--hidden-dropout", "0", "--save-interval", "3", "--override-opt-param-scheduler"]
    argv, drained = v_of(corpus, num_stages, 2, *off), ["--paci-drain-interval", "1"]
    workers, folder = pool(num_stages), str(tmp_path / "half")
    whole = workers.run("train", argv=[*argv, *V, *drained, "--save", folder])
    for flags in ([], [*PACI, *drained]):
        resumed = workers.run("train", argv=[*argv, *flags, "--load", folder, "--ckpt-step", "3"])
        assert len(resumed[-1].losses) == 3 and resumed[-1].losses == whole[-1].losses[3:], flags


@pytest.mark.parametrize(
    ("dp", "tp", "more"),
    [
        pytest.param(2, 1, ("--use-distributed-optimizer",), id="distributed-optimizer", marks=pytest.mark.slow),
        pytest.param(2, 1, (*OVERLAPPED, "--overlap-param-gather"), id="gathered-in-forwards"),
        pytest.param(2, 1, (*EXPERTS, "--expert-model-parallel-size", "2"), id="experts", marks=pytest.mark.slow),
        pytest.param(1, 2, (*TENSOR, "--sequence-parallel"), id="tensor-and-sequence", marks=pytest.mark.slow),
    ],
)
def test_with_other_parallelism_a_v_is_its_stages_emulated(
    pool: GetPool, corpus: str, dp: int, tp: int, more: tuple[str, ...]
) -> None:
    """Emulated by as many processes as there are pipelines, on one machine's cores."""
    num_stages = 2
    argv = [*v_of(corpus, num_stages, 2, *more, dp=dp), *V]
    processes = pool(num_stages * dp * tp).run("train", argv=argv)
    emulated = pool(dp * tp).run("train", argv=of_stages(argv))
    for rank, one in enumerate(emulated):
        mine = [processes[at * dp * tp + rank] for at in range(num_stages)]
        weights = [*(p.stage_weights[0] for p in reversed(mine)), *(p.stage_weights[1] for p in mine)]
        assert mine[-1].losses == one.losses and one.losses
        assert_same_weights(weights, one.stage_weights)
