"""What happens to a job outside of it, through torchrun: it is told to stop, or one of its ranks dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.torchrun import MODEL, finish, start, wait_for

ITERS = 100
# The one data worker of Megatron's must outlive a SIGTERM too.
COMMAND = [
    *("pretrain_gpt_paci.py", *MODEL, "--mock-data", "--pipeline-model-parallel-size", "2", "--num-workers", "1"),
    *("--train-iters", str(ITERS), "--save-interval", "30", "--override-opt_param-scheduler"),
]


def losses(path: Path) -> dict[int, float]:
    """By iteration, from the metrics file; in every bit, and of an iteration done twice the last."""
    found = {event["iteration"]: event["loss"] for event in read_metrics(path) if event["event"] == "train"}
    assert list(found) == list(range(1, ITERS + 1))
    return found


def last_checkpoint(folder: Path) -> int:
    """As the tracker has it."""
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--pipeline-schedule", "paci"), id="paci"),
        pytest.param((), id="1f1b", marks=pytest.mark.slow),
        pytest.param(
            ("--pipeline-schedule", "paci", "--async-save", "--async-strategy", "mcore"), id="async", marks=pytest.mark.slow
        ),
    ],
)
def test_sigterm_for_torchrun_after_a_save_loses_nothing(tmp_path: Path, more: tuple[str, ...]) -> None:
    def command(name: str) -> list[str]:
        folder = str(tmp_path / name)
        return [*COMMAND, *more, "--save", folder, "--load", folder, "--paci-metrics-file", f"{folder}.jsonl"]

    job = start(*command("stopped"), "--exit-signal-handler")
    wait_for(job, 35)
    os.kill(job.pid, signal.SIGTERM)
    output = finish(job)
    saved = last_checkpoint(tmp_path / "stopped")
    assert 35 <= saved < ITERS and saved % 30, output[-3000:]

    drained = ["--paci-drain-interval", str(saved)]  # without effect on 1f1b
    for name in ("stopped", "whole"):
        job = start(*command(name), *drained)
        output = finish(job)
        assert job.returncode == 0, output[-3000:]
    assert losses(tmp_path / "stopped.jsonl") == losses(tmp_path / "whole.jsonl")


@pytest.mark.slow
def test_a_rank_that_dies_once_is_brought_back_by_torchrun(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        folder = str(tmp_path / name)
        keeping = ["--save", folder, "--load", folder, "--paci-metrics-file", f"{folder}.jsonl"]
        return [*COMMAND, "--pipeline-schedule", "paci", *keeping]

    job = start(*command("killed"), launcher=("--max-restarts", "1"))
    wait_for(job, 35)
    ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    assert "at iteration 30" in output, "where it went on"

    job = start(*command("whole"))
    output = finish(job)
    assert job.returncode == 0, output[-3000:]
    assert losses(tmp_path / "killed.jsonl") == losses(tmp_path / "whole.jsonl")


def test_a_resume_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    def train(*more: str) -> tuple[int, list[str], str]:
        """The status, the lines of error, and all output."""
        keeping = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "4", "--train-iters", "8"]
        job = start("pretrain_gpt_paci.py", *MODEL, "--mock-data", "--pipeline-model-parallel-size", "2", *keeping, *more)
        output = finish(job)
        errors = [line for line in output.splitlines() if line.startswith("paci-megatron: error: ")]
        assert job.returncode == 0 or "Traceback (most" not in output.split("torch/distributed/elastic")[0], output[-6000:]
        return job.returncode, errors, output

    assert train("--exit-interval", "4")[0] == 0
    status, (line,), _ = train("--vocab-size", "1000")
    assert status != 0 and "a vocabulary of 128 tokens with padding, the command line one of 1024" in line
    status, (line,), _ = train("--global-batch-size", "8", "--pipeline-schedule", "paci")
    assert status != 0 and "--override-opt_param-scheduler" in line and "--use-checkpoint-opt_param-scheduler" in line
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("")
    status, (line,), output = train()
    assert status != 0 and line.endswith(f"The last complete one is of iteration 4: to go on from it, echo 4 > {tracker}")
    assert "initializ" not in output, "nothing was built"
