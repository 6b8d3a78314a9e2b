"""Says where every stage is when the pipeline hangs, or when asked by SIGUSR1."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from paci_megatron.config import ConfigError

from .diagnosis import plan_text, waiting_s, where
from .log import PREFIX

if TYPE_CHECKING:
    from .run import Run

_GRACE_S = 3.0  # between the first stage that gives up and the end of its process: the others get to speak too


def transfer_timeout_s(args: argparse.Namespace) -> float:
    """How long a stage may be at one action: ``--paci-transfer-timeout``, or three quarters of the process groups' time-out.

    ``ConfigError`` if it is not shorter than theirs. NCCL would then end the job first, without saying where each stage is.
    """
    groups_s, flag = (
        60.0 * args.distributed_timeout_minutes,
        f"--distributed-timeout-minutes {args.distributed_timeout_minutes}",
    )
    after_init_s = args.distributed_timeout_seconds_after_init
    if after_init_s is not None and after_init_s < groups_s:
        groups_s, flag = float(after_init_s), f"--distributed-timeout-seconds-after-init {after_init_s}"
    given_s = args.paci_transfer_timeout
    if given_s is None:
        return 0.75 * groups_s
    if given_s >= groups_s:
        raise ConfigError(
            f"--paci-transfer-timeout {given_s:g} with {flag}: the backend's own watchdog would end the job first, without "
            f"saying where the stages are. Give less than {groups_s:g} seconds, or raise the other."
        )
    return float(given_s)


class Watchdog:
    """A thread beside the training loop, which itself may be waiting for a transfer and able to say nothing.

    If a stage is at one action for longer than ``timeout_s``, the rank prints what it is waiting for, rank 0 also the plan
    of all stages around it, and the process ends with status 1. SIGUSR1 prints the same and ends nothing. If the rank is
    outside its plans for so long, in its data, an evaluation or a checkpoint, which may take their time, it says so once.
    """

    def __init__(self, run: Run, timeout_s: float, rank: int, output: TextIO | None = None) -> None:
        """Starts nothing yet. ``output`` is standard error unless given."""
        self._run = run
        self._timeout_s = timeout_s
        self._rank = rank
        self._output = output
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="paci-watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch. To be called in the main thread."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # A handler of Python's would run only when the wait is over; the number of the signal comes through at once.
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGUSR1, lambda *_: None)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and put the signal's handler back."""
        self._stopped.set()
        os.write(self._write_end, b"\0")
        self._thread.join()
        signal.set_wakeup_fd(self._wakeup_before)
        signal.signal(signal.SIGUSR1, self._handler_before)
        os.close(self._read_end)
        os.close(self._write_end)

    def _watch(self) -> None:
        interval_s = min(self._timeout_s / 4, 10.0)
        wakeups = select.poll()  # unlike select it takes the descriptors of a process that has many
        wakeups.register(self._read_end, select.POLLIN)
        told_s = -1.0
        while not self._stopped.is_set():
            if wakeups.poll(1000 * interval_s) and signal.SIGUSR1 in os.read(self._read_end, 64):
                self._tell("asked by SIGUSR1")
            late = any(waiting_s(running) > self._timeout_s for running in self._run.plans)
            if late and not self._stopped.is_set():
                self._tell(f"nothing has happened for {self._timeout_s:g} s (--paci-transfer-timeout)")
                time.sleep(_GRACE_S)
                os._exit(1)
            since_s = self._run.since_s
            computing = any(running.executor.current is not None for running in self._run.plans)
            if not computing and since_s != told_s and time.monotonic() - since_s > self._timeout_s:
                self._tell(f"outside the plan for {self._timeout_s:g} s, and other stages may wait for it")
                told_s = since_s

    def _tell(self, reason: str) -> None:
        plans = self._run.plans  # the training loop replaces it as a whole
        places = [where(running) for running in plans] or [
            f"stage {stage.stage_index}: drained" for stage in self._run.stages
        ]
        lines = [f"{PREFIX} rank {self._rank}, {place}: {reason}" for place in places]
        if self._rank == 0 and plans:
            lines.append(plan_text(plans[0]))
        print("\n".join(lines), file=self._output or sys.stderr, flush=True)
