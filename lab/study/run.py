"""Runs a study's commands, several at once, and ends them when it is ended itself."""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lab import processes
from paci_megatron.telemetry.metrics_file import read_metrics

from .arms import StudyError
from .records import RunFolder

_POLL_S = 0.5


@dataclass(frozen=True)
class Run:
    """One training: its name, its command, where it is kept, and when it has ended."""

    name: str
    command: list[str]
    folder: RunFolder
    train_iters: int


@dataclass
class _Attempt:
    run: Run
    process: subprocess.Popen[bytes]
    metrics: Path
    log: IO[bytes]
    begin_s: float
    iteration: int = 0


@contextlib.contextmanager
def sole_user(output: Path) -> Iterator[None]:
    """Hold ``output`` against a second study; ``StudyError`` if there is one."""
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(f"--output {output}: another reproduce_paper.py is running there; wait, or end it") from error
        yield


def run_step(name: str, command: list[str], log: Path, variables: dict[str, str]) -> None:
    """Run a short command to its end; ``StudyError`` with the end of its log if it fails."""
    with open(log, "ab") as file:
        process = processes.start(command, file, variables)
        try:
            status = process.wait()
        except BaseException:
            processes.end(process)
            raise
    if status:
        raise _failure(name, status, log)


def run_all(runs: list[Run], jobs: int, variables: dict[str, str]) -> None:
    """Run what is not done, ``jobs`` at once, in order. ``StudyError`` at the first failure, which ends the others."""
    from tqdm import tqdm

    for run in runs:
        run.folder.claim(run.command)
    waiting = [run for run in runs if not run.folder.is_done]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} done before, {jobs} at a time", flush=True)
    active: list[_Attempt] = []
    # disable=None: a moving bar is shown only where a person is watching; lines at start and end always.
    with tqdm(total=sum(run.train_iters for run in waiting), unit=" updates", disable=None, smoothing=0.05) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    active.append(_begin(waiting.pop(0), variables))
                    bar.update(active[-1].iteration)
                time.sleep(_POLL_S)
                for attempt in list(active):
                    bar.update(_advance(attempt))
                    if attempt.process.poll() is not None:
                        active.remove(attempt)
                        _finish(attempt)
                bar.set_postfix_str(", ".join(f"{a.run.name} {a.iteration}/{a.run.train_iters}" for a in active))
        except BaseException:
            processes.end(*(attempt.process for attempt in active))
            raise


def _begin(run: Run, variables: dict[str, str]) -> _Attempt:
    start = run.folder.checkpoint_iteration()
    metrics = run.folder.begin_attempt()
    command = [*run.command, "--paci-metrics-file", str(metrics)]
    _say(f"{run.name}: " + (f"resumes after update {start}" if start else "starts") + f", log in {run.folder.log}")
    log = open(run.folder.log, "ab")  # noqa: SIM115 - open as long as the run
    return _Attempt(run, processes.start(command, log, variables), metrics, log, time.perf_counter(), iteration=start)


def _advance(attempt: _Attempt) -> int:
    """Updates since the last look."""
    attempt.run.folder.drop_old_checkpoints()
    events = read_metrics(attempt.metrics) if attempt.metrics.exists() else []
    before, attempt.iteration = attempt.iteration, max([attempt.iteration, *(event["iteration"] for event in events[-1:])])
    return attempt.iteration - before


def _finish(attempt: _Attempt) -> None:
    attempt.log.close()
    run, status = attempt.run, attempt.process.returncode
    if status:
        raise _failure(run.name, status, run.folder.log)
    events = run.folder.events()
    evaluations = [event for event in events if event["event"] == "evaluation"]
    if not evaluations or evaluations[-1]["iteration"] != run.train_iters:
        last = events[-1]["iteration"] if events else 0
        raise StudyError(
            f"{run.name}: it ended without an error, but its metrics end at update {last} of {run.train_iters}; see "
            f"{run.folder.log}, and remove {run.folder.path} to run it again"
        )
    seconds = time.perf_counter() - attempt.begin_s
    run.folder.finish(seconds)
    _say(
        f"{run.name}: done in {seconds / 60:.1f} min, loss {evaluations[-1]['loss']:.4f}, perplexity "
        f"{evaluations[-1]['perplexity']:.2f}"
    )


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def _failure(name: str, status: int, log: Path) -> StudyError:
    return StudyError(f"{processes.failure(name, status, log)}. Rerun the same command to try it again.")
