"""A pool of worker processes with Megatron imported, so that a test pays for its training and not for start-up.

Each worker is one rank over gloo. A job is a function of ``tests.support.jobs``, run on every rank at once; its
results come back in rank order. A job that fails or hangs takes its pool with it, and the next test gets a new one.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import multiprocessing
import os
import signal
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from lab.processes import CPU_ENVIRONMENT
from lab.workers import Ranks, Starter

JOB_TIMEOUT_S = 240


class JobError(AssertionError):
    """A rank raised; the message holds its traceback."""


@functools.cache
def starter() -> Starter:
    """Forks processes in which Megatron and the jobs are imported."""
    return Starter("tests.support.preload", CPU_ENVIRONMENT)


class Pool:
    """``world_size`` workers that run jobs together."""

    def __init__(self, world_size: int) -> None:
        self._ranks = Ranks(starter(), world_size, _work)

    def run(self, job: str, **arguments: Any) -> list[Any]:
        """The results of ``tests.support.jobs.<job>(**arguments)``, by rank; :class:`JobError` if any rank fails."""
        for connection in self._ranks.connections:
            connection.send((job, arguments))
        results: dict[int, Any] = {}
        try:
            for rank, answer in self._ranks.answers(JOB_TIMEOUT_S):
                failed, results[rank] = answer or (True, "the worker died")
                if failed:
                    self.close()
                    raise JobError(f"{job}, rank {rank}:\n{results[rank]}")
        except TimeoutError as error:
            (late,) = error.args
            for rank in late:
                os.kill(self._ranks.processes[rank].pid, signal.SIGUSR1)  # it prints where it is, see _work
            time.sleep(1)
            self.close()
            raise JobError(f"{job}: ranks {late} did not finish within {JOB_TIMEOUT_S} s") from None
        return [results[rank] for rank in sorted(results)]

    @property
    def is_closed(self) -> bool:
        """Whether the workers are gone."""
        return not self._ranks.processes

    def close(self) -> None:
        """Stop the workers."""
        self._ranks.end()


def _work(connection: Connection) -> None:
    """A worker's life: start the process group, then answer jobs. One whose pool is gone reads the end of its pipe."""
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Megatron's first save would start an interpreter for this queue, which takes seconds on each rank.
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from . import jobs

    gc.freeze()  # the modules stay, and need not be looked at again

    while True:
        try:
            job, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, getattr(jobs, job)(**arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))
        # A run's process groups lie in circles with its model, and each has threads that wake up a hundred times a second:
        # left to themselves they would soon take all the time there is.
        gc.collect()
