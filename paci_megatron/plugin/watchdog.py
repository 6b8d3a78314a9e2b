"""Says where every stage is when the pipeline hangs, or when asked by SIGUSR1."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

from .stage import Stage

_GRACE_S = 3.0  # between the first stage that gives up and the end of its process: the others get to speak too


class Watchdog:
    """A thread beside the training loop, which itself may be waiting for a transfer and able to say nothing.

    If a stage is at one action for longer than ``timeout_s``, the rank prints what it is waiting for, rank 0 also the plan
    of all stages around it, and the process ends with status 1. SIGUSR1 prints the same and ends nothing.
    """

    def __init__(self, stages: Sequence[Stage], timeout_s: float, rank: int, output: TextIO | None = None) -> None:
        """To be called in the main thread."""
        self._stages = stages
        self._timeout_s = timeout_s
        self._rank = rank
        self._output = output
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # A handler of Python's would run only when the wait is over; the number of the signal comes through at once.
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGUSR1, lambda *_: None)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="paci-watchdog", daemon=True)
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
        while not self._stopped.is_set():
            ready, _, _ = select.select([self._read_end], [], [], interval_s)
            if ready and signal.SIGUSR1 in os.read(self._read_end, 64):
                self._report("asked by SIGUSR1")
            late = [stage for stage in self._stages if stage.waiting_s() > self._timeout_s]
            if late and not self._stopped.is_set():
                self._report(f"nothing has happened for {self._timeout_s:g} s (--paci-transfer-timeout)")
                time.sleep(_GRACE_S)
                os._exit(1)

    def _report(self, reason: str) -> None:
        lines = [f"paci-megatron: rank {self._rank}, {stage.where()}: {reason}" for stage in self._stages]
        if self._rank == 0:
            lines.append(self._stages[0].plan_text())
        print("\n".join(lines), file=self._output or sys.stderr, flush=True)
