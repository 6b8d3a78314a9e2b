"""The one place outside ``host/`` that touches ``torch.cuda``: timing what a device waits for."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class Stopwatch:
    """Sums the seconds between pairs of :meth:`start` and :meth:`stop` as the stage's device sees them.

    On a GPU the host runs ahead, so pairs of CUDA events in the current stream are kept and read only by
    :meth:`take_s`; on a CPU the monotonic clock is enough.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a wait."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self._events.append((begin, end))
        else:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """End the wait that :meth:`start` began."""
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def so_far_s(self) -> float:
        """The seconds summed since :meth:`take_s`, without waiting: on a GPU as far as it has got."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1000
        return self._seconds

    def take_s(self) -> float:
        """The seconds summed since the last call, which starts again from zero. Synchronises with a GPU."""
        if self._events:
            self._events[-1][1].synchronize()
            self.so_far_s()
        taken, self._seconds = self._seconds, 0.0
        return taken


Moment = Any
"""A moment that :class:`DeviceClock` has marked."""


class DeviceClock:
    """Marks moments as the stage's device sees them, without waiting for it.

    On a GPU a moment is a CUDA event in the current stream, whose time is known once the device has come to it; on a CPU
    it is a reading of the monotonic clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Moment:
        """This moment."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, moment: Moment) -> bool:
        """Whether the device has come to ``moment``, and with it to all earlier ones."""
        return not self._on_gpu or bool(moment.query())

    def wait_for(self, moment: Moment) -> None:
        """Wait until the device has come to ``moment``."""
        if self._on_gpu:
            moment.synchronize()

    def seconds(self, since: Moment, until: Moment) -> float:
        """From one passed moment to a later one. On a GPU exact to a microsecond while they are seconds apart."""
        return float(since.elapsed_time(until) / 1000 if self._on_gpu else until - since)
