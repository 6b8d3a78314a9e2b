"""Timed stages: every forward and backward takes the time it is told to, by sleeping for what computing left of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a stage's forward and backward of a micro-batch, all its chunks together, varied by ``jitter``.

    ``slow`` has a factor, and from which action to which, counted from 0, everything takes that many times as long.
    """

    forward_s: float
    backward_s: float
    jitter: float = 0.0
    seed: int = 0
    chunks: int = 1
    slow: tuple[float, int, int] = (1.0, 0, 0)


class Padding:
    """One stage's timed actions.

    The jitter is that of ``simulate/engine.py``, which draws one number for every action of the stage, updates included:
    so that the simulator foretells this very run, :meth:`skip_update` draws an update's.

    A sleep ends a little late, each time, and later where processes share cores. What an action is late by, the next one
    is told to be shorter, so that on average actions take the time they are told to.
    """

    def __init__(
        self,
        times: StageTimes,
        stage_index: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._times = times
        self._random = Random(f"{times.seed}/{stage_index}")
        self._clock = clock
        self._sleep = sleep
        self._late_s = 0.0
        self._actions = self._overruns = self._done = 0

    def forward[T](self, work: Callable[[], T]) -> T:
        """Do ``work``, a forward of one chunk, in its time."""
        return self._padded(work, self._times.forward_s / self._times.chunks)

    def backward[T](self, work: Callable[[], T]) -> T:
        """Do ``work``, a backward of one chunk, in its time."""
        return self._padded(work, self._times.backward_s / self._times.chunks)

    def skip_update(self) -> None:
        """An update has been done, in whatever time it takes."""
        self._vary(0.0)

    def take_counts(self) -> tuple[int, int]:
        """Actions since the last call, and those of them that computed for longer than they had time."""
        taken = self._actions, self._overruns
        self._actions = self._overruns = 0
        return taken

    def _padded[T](self, work: Callable[[], T], duration_s: float) -> T:
        begin_s = self._clock()
        factor, first, end = self._times.slow
        duration_s = self._vary(duration_s) * (factor if first <= self._done < end else 1)
        self._done += 1
        deadline_s = begin_s + duration_s - self._late_s
        result = work()
        computed_s = self._clock()
        self._actions += 1
        self._overruns += computed_s > begin_s + duration_s
        if computed_s < deadline_s:
            self._sleep(deadline_s - computed_s)
            self._late_s = self._clock() - deadline_s
        else:
            # Computing for too long is not made up for: it is reported.
            self._late_s = min(computed_s, begin_s + duration_s) - deadline_s
        return result

    def _vary(self, duration_s: float) -> float:
        jitter = self._times.jitter
        return duration_s * (1 + jitter * (2 * self._random.random() - 1)) if jitter else duration_s
