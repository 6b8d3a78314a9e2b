"""Runs the ranks of a measured training, and brings back what each of them measured.

Each measurement has processes of its own: nothing of the one before is left in them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from lab.processes import CPU_ENVIRONMENT, tail
from lab.workers import Ranks, Starter

from .jobs import Job, RankResult
from .worker import run_rank


class WorkerError(RuntimeError):
    """A rank failed, died or did not finish; the message holds the end of its log."""


class Launcher:
    """Runs jobs on processes of this machine, on its CPU or with one accelerator a rank."""

    def __init__(self, on_cpu: bool) -> None:
        self._starter = Starter("lab.benchmark.preload", CPU_ENVIRONMENT) if on_cpu else Starter(None, {})

    def run(self, num_ranks: int, job: Job, logs: Path, timeout_s: float) -> list[RankResult]:
        """The results of all ranks, whose output goes to ``logs``; ``WorkerError`` if one fails or takes too long."""
        logs.mkdir(parents=True, exist_ok=True)
        ranks = Ranks(self._starter, num_ranks, _work, job, logs)
        results: dict[int, RankResult] = {}
        try:
            for rank, result in ranks.answers(timeout_s):
                if result is None:
                    raise WorkerError(f"rank {rank} failed{_end_of(_log(logs, rank))}")
                results[rank] = result
        except TimeoutError as error:
            (late,) = error.args
            end = _end_of(_log(logs, late[0]))
            raise WorkerError(f"ranks {late} did not finish within {timeout_s:.0f} s{end}") from None
        finally:
            ranks.end()
        return [results[rank] for rank in range(num_ranks)]


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def _end_of(log: Path) -> str:
    return "".join(f"\n  {line}" for line in tail(log)) + f"\nsee {log}"


def _work(connection: Connection, job: Job, logs: Path) -> None:
    """A rank's life: train, answer with what was measured or None, and wait until the parent ends it."""
    rank = int(os.environ["RANK"])
    output = os.open(_log(logs, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        connection.send(run_rank(rank, job))
        # The others may still be talking to this process.
        with contextlib.suppress(EOFError):
            connection.recv()
    except BaseException:  # a SystemExit is how a command line is refused
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(None)
