"""Ranks of a job as child processes of this one, each at the other end of a pipe: started, listened to, and ended.

On the CPU they are forked from a server that has imported everything once, so that eight of them start in a second or two.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

from torch.distributed import TCPStore

from .processes import ROOT


class Starter:
    """Starts processes: forked from a server that has imported the module ``preload``, or spawned if it is None.

    CUDA does not survive a fork of a process that has touched it, and importing may.
    """

    def __init__(self, preload: str | None, environment: Mapping[str, str]) -> None:
        """The processes run with ``environment`` over this one's. There is one server a process: one ``preload``."""
        self._environment = environment
        self.context: BaseContext = multiprocessing.get_context("spawn" if preload is None else "forkserver")
        if preload is not None:
            self.context.set_forkserver_preload([preload])
            with self.environment():
                forkserver.ensure_running()

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Within it this process has the children's environment."""
        saved = dict(os.environ)
        path = filter(None, [str(ROOT), saved.get("PYTHONPATH")])
        os.environ.update(self._environment, PYTHONPATH=os.pathsep.join(path))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(saved)


class Ranks:
    """``num_ranks`` processes that each run ``work(connection, *arguments)`` as one rank of a process group."""

    def __init__(self, starter: Starter, num_ranks: int, work: Callable[..., None], *arguments: Any) -> None:
        # Served from here: a port that is only looked up now could be taken by the time rank 0 serves on it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        with starter.environment():
            for rank in range(num_ranks):
                ours, theirs = starter.context.Pipe()
                # Not daemons, which may not have children: Megatron writes a checkpoint in a child process.
                process = starter.context.Process(  # type: ignore[attr-defined]
                    target=_begin, args=(rank, num_ranks, self._store.port, work, theirs, *arguments)
                )
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)

    def answers(self, timeout_s: float) -> Iterator[tuple[int, Any]]:
        """The ranks' next answers as (rank, answer), as they come; None for a rank that has died.

        ``TimeoutError`` with the ranks that have not answered within ``timeout_s`` as its argument.
        """
        pending = dict(enumerate(self.connections))
        deadline_s = time.monotonic() + timeout_s
        while pending:
            ready = wait(list(pending.values()), timeout=max(deadline_s - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(list(pending))
            for rank in [rank for rank, connection in pending.items() if connection in ready]:
                try:
                    answer = pending.pop(rank).recv()
                except EOFError:
                    answer = None
                yield rank, answer

    def end(self) -> None:
        """End the processes, and the children they have started: Megatron's checkpoints leave one in each."""
        for process in self.processes:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        self.processes.clear()


def _begin(rank: int, num_ranks: int, port: int, work: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    """A rank's life, in a group of its own: an interrupt is for the parent, and ``Ranks.end`` reaches its children."""
    os.setsid()
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
    work(connection, *arguments)
