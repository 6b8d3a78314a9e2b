"""Starts the ranks of a measured training, and brings back what each of them measured.

On the CPU they are forked from a server that has imported everything once, so that eight of them start in seconds. Each
measurement has processes of its own: nothing of the one before is left in them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path

from torch.distributed import TCPStore

import paci_megatron

from .jobs import Job, RankResult
from .worker import run_rank

ROOT = Path(paci_megatron.__file__).parents[1]
TAIL_LINES = 30

# One thread, so that forking is safe and stages have a core each. No torch.compile: each process would spend ten seconds on
# Megatron's small fused functions, of which a CPU uses none.
_CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


class WorkerError(RuntimeError):
    """A rank failed, died or did not finish; the message holds the end of its log."""


class Launcher:
    """Runs jobs on processes of this machine, on its CPU or with one accelerator a rank."""

    def __init__(self, on_cpu: bool) -> None:
        self._environment = _CPU_ENVIRONMENT if on_cpu else {}
        # CUDA does not survive a fork of a process that has touched it, and importing may.
        self._context: BaseContext = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            self._context.set_forkserver_preload(["lab.benchmark.preload"])
            with self._child_environment():
                forkserver.ensure_running()

    def run(self, num_ranks: int, job: Job, logs: Path, timeout_s: float) -> list[RankResult]:
        """The results of all ranks, whose output goes to ``logs``; ``WorkerError`` if one fails or takes too long."""
        logs.mkdir(parents=True, exist_ok=True)
        # Served from here: a port that is only looked up now could be taken by the time rank 0 serves on it.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        connections, processes = [], []
        try:
            with self._child_environment():
                for rank in range(num_ranks):
                    ours, theirs = self._context.Pipe()
                    arguments = (rank, num_ranks, store.port, job, _log(logs, rank), theirs)
                    process = self._context.Process(target=_work, args=arguments)  # type: ignore[attr-defined]
                    process.start()
                    theirs.close()
                    connections.append(ours)
                    processes.append(process)
            return _collect(connections, logs, timeout_s)
        finally:
            for process in processes:
                process.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()

    @contextlib.contextmanager
    def _child_environment(self) -> Iterator[None]:
        saved = dict(os.environ)
        path = filter(None, [str(ROOT), saved.get("PYTHONPATH")])
        os.environ.update(self._environment, PYTHONPATH=os.pathsep.join(path))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(saved)


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


def _collect(connections: list[Connection], logs: Path, timeout_s: float) -> list[RankResult]:
    results: dict[int, RankResult] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(results) < len(connections):
        pending = [rank for rank in range(len(connections)) if rank not in results]
        ready = wait([connections[rank] for rank in pending], timeout=max(deadline_s - time.monotonic(), 0))
        if not ready:
            raise WorkerError(f"ranks {pending} did not finish within {timeout_s:.0f} s{_tail(_log(logs, pending[0]))}")
        for rank in (rank for rank in pending if connections[rank] in ready):
            try:
                result = connections[rank].recv()
            except EOFError:
                result = None
            if result is None:
                raise WorkerError(f"rank {rank} failed{_tail(_log(logs, rank))}")
            results[rank] = result
    return [results[rank] for rank in range(len(connections))]


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "".join(f"\n  {line}" for line in lines[-TAIL_LINES:]) + f"\nsee {log}"


def _work(rank: int, num_ranks: int, port: int, job: Job, log: Path, connection: Connection) -> None:
    """A rank's life: train, answer with what was measured or None, and wait until the parent ends it."""
    os.setsid()  # an interrupt is for the parent, which then ends this process and its children
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # As torchrun says it: the store is there already.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    try:
        connection.send(run_rank(rank, job))
        # The others may still be talking to this process.
        with contextlib.suppress(EOFError):
            connection.recv()
    except BaseException:  # a SystemExit is how a command line is refused
        traceback.print_exc()
        sys.stderr.flush()
        connection.send(None)
