"""A pool of worker processes with Megatron imported, so that a test pays for its training and not for start-up.

Each worker is one rank over gloo. A job is a function of ``tests.multiproc.jobs``, run on every rank at once; its
results come back in rank order. A job that fails or hangs takes its pool with it, and the next test gets a new one.
Workers are forked from a server that has imported everything once, so a new pool costs a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import time
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

JOB_TIMEOUT_S = 240
ROOT = Path(__file__).parents[2]


class JobError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Pool:
    """``world_size`` workers that run jobs together."""

    def __init__(self, world_size: int) -> None:
        context = _context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemons, which may not have children: Megatron writes a checkpoint in a child process. A worker whose
            # pool is gone reads the end of its pipe and returns.
            process = context.Process(target=_work, args=(rank, world_size, port, theirs))
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """The results of ``tests.multiproc.jobs.<job>(**arguments)``, by rank; :class:`JobError` if any rank fails."""
        for connection in self._connections:
            connection.send((job, arguments))
        results: dict[Connection, Any] = {}
        deadline = time.monotonic() + JOB_TIMEOUT_S
        while len(results) < len(self._connections):
            pending = [c for c in self._connections if c not in results]
            ready = wait(pending, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                ranks = [self._connections.index(c) for c in pending]
                for rank in ranks:
                    os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)  # it prints where it is, see _work
                time.sleep(1)
                self.close()
                raise JobError(f"{job}: ranks {ranks} did not finish within {JOB_TIMEOUT_S} s")
            for connection in (c for c in pending if c in ready):
                try:
                    failed, value = connection.recv()
                except EOFError:
                    failed, value = True, "the worker died"
                if failed:
                    self.close()
                    raise JobError(f"{job}, rank {self._connections.index(connection)}:\n{value}")
                results[connection] = value
        return [results[connection] for connection in self._connections]

    @property
    def is_closed(self) -> bool:
        """Whether the workers are gone."""
        return not self._processes

    def close(self) -> None:
        """Stop the workers, and the children they have started: Megatron's checkpoints leave one in each."""
        for process in self._processes:
            assert process.pid is not None
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self._processes.clear()


# What the server runs with. One thread, so that forking is safe. No torch.compile: each process would spend ten seconds on
# Megatron's small fused functions, which compute the same without it.
_SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def _context() -> ForkServerContext:
    """Forks workers from a server process, started on first use, that has imported ``tests.multiproc.preload``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.multiproc.preload"])
    saved = dict(os.environ)
    path = filter(None, [str(ROOT), saved.get("PYTHONPATH")])
    os.environ.update(_SERVER_ENVIRONMENT, PYTHONPATH=os.pathsep.join(path))
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(saved)
    return context


def _work(rank: int, world_size: int, port: int, connection: Connection) -> None:
    """A worker's life: start the process group, then answer jobs."""
    os.setsid()  # so that close() reaches its children too
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from . import jobs

    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, getattr(jobs, job)(**arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
