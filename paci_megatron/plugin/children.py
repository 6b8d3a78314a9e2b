"""Keeps the helper processes of Megatron's checkpoints alive when the job is told to stop.

torchrun passes SIGTERM on to the whole process group of each rank. A rank handles it (``--exit-signal-handler``) and has a
checkpoint to save yet; the processes that Megatron started for its first save would die, and the last save with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

Function = Callable[..., Any]

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def leave_process_group() -> None:
    """In a child process, first of all: signals for its parent's process group do not reach it, and it ends with its parent.

    It is to be started inside :func:`_sigterm_held`, so that no SIGTERM comes before this.
    """
    os.setpgrp()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # drops one that has come and is held
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def _sigterm_held() -> Iterator[None]:
    """A SIGTERM that comes inside is handled after it; a process that is started inside holds it likewise."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def wrap_get_write_results_queue(original: Function) -> Function:
    """Wrap ``get_write_results_queue``, whose queue lives in a process of its own from the first save on."""

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        from multiprocessing.managers import SyncManager

        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from torch import multiprocessing

        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
            with _sigterm_held():
                manager.start(leave_process_group)
            filesystem_async._results_queue = manager.Queue()
        return original(mp_mode)

    return get_write_results_queue


def wrap_schedule_async_call(original: Function) -> Function:
    """Wrap ``PersistentAsyncCaller.schedule_async_call``, the first of which starts the process that writes them all."""

    @functools.wraps(original)
    def schedule_async_call(self: Any, async_req: Any) -> None:
        owner = type(self)
        if owner._persistent_process is not None:
            return original(self, async_req)
        loop = owner.async_loop
        owner.async_loop = staticmethod(write_asynchronous_saves)
        try:
            with _sigterm_held():
                return original(self, async_req)
        finally:
            owner.async_loop = staticmethod(loop)

    return schedule_async_call


def write_asynchronous_saves(*arguments: Any) -> None:
    """The main function of that process; Megatron's own, out of reach of signals."""
    leave_process_group()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.async_loop(*arguments)
