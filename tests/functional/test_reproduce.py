"""The smoke set end to end: interrupted in the middle of a training and rerun, it reports what an uninterrupted one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def command(output: Path, text: list[Path], *more: str) -> list[str]:
    tool = [sys.executable, str(ROOT / "tools/reproduce_paper.py"), "--set", "smoke", "--output", str(output)]
    return [*tool, "--text", *map(str, text), *more]


def checkpoint_of(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    except (FileNotFoundError, ValueError):
        return 0


def interrupt_after_first_checkpoint(output: Path, text: list[Path], run: Path) -> None:
    """Start the study and press Ctrl-C between the run's first checkpoint and its end."""
    log = output.with_suffix(".log")
    with open(log, "wb") as file:
        process = subprocess.Popen(command(output, text), stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 200
        while not checkpoint_of(run):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.terminate()
    assert not (run / "done.json").exists(), "the run was over before the interrupt"


def losses(output: Path) -> list[Any]:
    report = json.loads((output / "report.json").read_text())
    assert report["finished_runs"] == report["planned_runs"] == 2
    return [(row["arm"], row["validation_loss"], row["training_loss"]) for row in report["arms"]]


@pytest.fixture
def text(tmp_path: Path) -> list[Path]:
    """A few documents that Python's library happens to have."""
    paths = []
    for name in ("argparse", "ast", "bdb", "calendar", "cmd", "codecs"):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text((Path(os.__file__).parent / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return paths


@pytest.mark.timeout(600)  # the trainings take 40 s, on cores that are free
@pytest.mark.slow
def test_an_interrupted_study_goes_on_and_reports_the_same(tmp_path: Path, text: list[Path]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole, text, "--jobs", "2"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run = broken / "runs" / "flush-b4-a2-seed1"
    interrupt_after_first_checkpoint(broken, text, run)
    resumed = subprocess.run(command(broken, text, "--jobs", "2"), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert "flush-b4-a2-seed1: resumes after update " in resumed.stdout
    assert len(list(run.glob("metrics-*.jsonl"))) == 2
    assert losses(broken) == losses(whole)
    for name in ("report.md", "loss_by_tokens.png", "perplexity_by_time.png", "throughput.png"):
        assert (broken / name).stat().st_size > 0

    refused = subprocess.run(command(broken, text, "--tokens", "768"), capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "it holds a run of another command" in refused.stderr
