"""The timer of Megatron's log line, where plans are run."""

from __future__ import annotations

import time

from megatron.core.timers import Timer


class IntervalTimer(Timer):
    """Megatron's timer without its barrier over all ranks and without synchronising the device, twice a log line each.

    Either would stop the pipeline. The host's clock is enough: every update waits for the device once, so the host is never
    ahead by more than one. The time shown is that of the rank that prints it.
    """

    def start(self, barrier: bool = False) -> None:
        """See ``Timer.start``."""
        self._start_time = time.time()
        self._started = True

    def stop(self, barrier: bool = False) -> None:
        """See ``Timer.stop``."""
        elapsed_s = time.time() - self._start_time
        self._elapsed += elapsed_s
        self._active_time += elapsed_s
        self._started = False
