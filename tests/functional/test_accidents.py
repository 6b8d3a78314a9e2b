"""What happens to a job outside of it, through torchrun: it is told to stop, or one of its ranks dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .test_commands import ENVIRONMENT, MODEL, ROOT

ITERS = 100
# The one data worker of Megatron's must outlive a SIGTERM too.
COMMAND = [
    *("pretrain_gpt_paci.py", *MODEL, "--mock-data", "--pipeline-model-parallel-size", "2", "--num-workers", "1"),
    *("--train-iters", str(ITERS), "--save-interval", "30", "--override-opt_param-scheduler"),
]


def start(*command: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """torchrun with two processes, its output together."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *launcher, *command]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, **pipes)


def finish(job: subprocess.Popen[str]) -> str:
    """What it prints from here to its end."""
    try:
        return job.communicate(timeout=150)[0]
    finally:
        job.kill()


def wait_for(job: subprocess.Popen[str], iteration: int) -> None:
    """Reads on until the log line of ``iteration``."""
    assert job.stdout is not None
    printed = []
    for line in job.stdout:
        printed.append(line)
        if re.search(rf" iteration +{iteration}/", line):
            return
    raise AssertionError("".join(printed)[-3000:])


def losses(path: Path) -> dict[int, float]:
    """By iteration, from the metrics file; in every bit, and of an iteration done twice the last."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    found = {event["iteration"]: event["loss"] for event in events if event["event"] == "train"}
    assert list(found) == list(range(1, ITERS + 1))
    return found


def last_checkpoint(folder: Path) -> int:
    """As the tracker has it."""
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--pipeline-schedule", "paci"), id="paci"),
        pytest.param((), id="1f1b"),
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
