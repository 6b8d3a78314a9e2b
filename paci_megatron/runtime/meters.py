"""What a stage measures of itself."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from paci_megatron.runtime.device import Stopwatch
from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan


@dataclass(frozen=True)
class StageFigures:
    """A stage's figures since they were last taken. Drift in updates, times in seconds, fractions in [0, 1].

    ``max_weight_change`` and ``mean_weight_change`` are the drift as a share of the weights, over the micro-batches of which
    drift is counted, see :class:`~.weight_drift.WeightDrift`.

    ``host_bound_fraction`` is what of the time that counts as computing may have been waits of a GPU for its host.
    ``copied_weight_bytes`` is the most that copies of older weights held; 0 under PACI, see ``--paci-weight-policy``.
    """

    stage_index: int
    updates: int
    skipped_updates: int
    max_drift: int
    mean_drift: float
    max_weight_change: float
    mean_weight_change: float
    max_in_flight: int
    bubble_fraction: float
    host_bound_fraction: float
    wall_s: float
    copied_weight_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


class ActionTimes(NamedTuple):
    """How long a stage's actions of one kind took: the median in seconds, and between which shares of it, 1 - ``spread`` and
    1 + ``spread``, they are evenly distributed if they are.
    """

    median_s: float
    spread: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> ActionTimes:
        """Nothing where there are too few."""
        ordered = sorted(seconds)
        if len(ordered) < 2:
            return cls(ordered[0] if ordered else 0.0, 0.0)
        # Without the tenths at both ends, where the first actions of a process are.
        tenths = quantiles(ordered, n=10, method="inclusive")
        middle = median(ordered)
        return cls(middle, (tenths[-1] - tenths[0]) / 1.6 / middle if middle else 0.0)


def together_idle(bubble_fractions: Sequence[float]) -> float:
    """The share of the time in which none of the stages of a process computes; they take turns."""
    return max(1.0 - sum(1.0 - each for each in bubble_fractions), 0.0)


class BoundError(RuntimeError):
    """A stage went beyond what its schedule allows: a bug in the schedule or its execution."""


class StageMeter:
    """Counts drift, micro-batches in flight, updates and computing time, and holds them against PACI's bounds."""

    def __init__(self, stage_index: int, num_stages: int, device: torch.device) -> None:
        self.stage_index = stage_index
        self.num_stages = num_stages
        self.device = device
        self.beside: tuple[StageMeter, ...] = ()  # of the other stages of this process, where each has its share of the time
        self.saved_activation_bytes: int | None = None  # the most that was left for backwards, where it was counted
        self.bytes_per_microbatch: float | None = None  # of that, while the pipeline was full
        self._busy = Stopwatch(device)
        self._drift_bound = 0
        self._in_flight_bound = 0
        self._max_drift = self._max_in_flight = self._copied_weight_bytes = 0
        self._interval_since = self._interval_busy_s = 0.0
        self._interval_host_bound_s = self.host_bound_fraction = 0.0
        self._interval_bubble = math.nan
        self.window_weight_change = 0.0  # the largest of the last window
        self._max_weight_change = self._weight_change_sum = 0.0
        self.restart()

    def begin_plan(self, plan: Plan) -> None:
        """Set the bounds of the plan that starts now."""
        self._drift_bound = plan.max_drift(self.stage_index)
        self._in_flight_bound = plan.max_in_flight(self.stage_index)

    @contextlib.contextmanager
    def computing(self, what: str = "") -> Iterator[None]:
        """Time spent inside is work; what remains of the wall time is the stage's bubble. ``what`` is the action's kind."""
        self._busy.start(what)
        try:
            yield
        finally:
            self._busy.stop()

    def count_forward(self, in_flight: int) -> None:
        """Note a forward, after which ``in_flight`` micro-batches are in flight."""
        self._max_in_flight = max(self._max_in_flight, in_flight)
        if in_flight > self._in_flight_bound:
            raise BoundError(
                f"stage {self.stage_index}: {in_flight} micro-batches in flight, the schedule allows "
                f"{self._in_flight_bound}; this is a bug in paci-megatron, please report it"
            )

    def count_backward(self, drift: int) -> None:
        """Note a backward whose weights are ``drift`` updates newer than its forward's."""
        self._backwards += 1
        self._drift_sum += drift
        self._max_drift = max(self._max_drift, drift)
        if drift > self._drift_bound:
            raise BoundError(
                f"stage {self.stage_index}: drift of {drift} updates, the schedule allows {self._drift_bound}; "
                "this is a bug in paci-megatron, please report it"
            )

    def count_weight_changes(self, changes: Sequence[float], backwards: Sequence[int]) -> None:
        """Note the relative changes of the weights over the drift of a window's backwards, so many backwards of each."""
        self.window_weight_change = max(changes, default=0.0)
        self._max_weight_change = max(self._max_weight_change, self.window_weight_change)
        self._weight_change_sum += sum(change * count for change, count in zip(changes, backwards, strict=True))

    def count_update(self, successful: bool) -> None:
        """Note an update, applied or skipped."""
        self._updates += 1
        self._skipped += not successful

    def count_copies(self, weight_bytes: int) -> None:
        """Note how much copies of older weights hold."""
        self._copied_weight_bytes = max(self._copied_weight_bytes, weight_bytes)

    def end_interval(self) -> None:
        """A log interval ends here, and the next begins. Waits for nothing: what a device has still to do counts later."""
        now, busy_s = time.perf_counter(), self._busy.so_far_s()
        wall_s, host_bound_s = now - self._interval_since, self._busy.host_bound_s
        self._interval_bubble = min(max(1.0 - (busy_s - self._interval_busy_s) / wall_s, 0.0), 1.0)
        self.host_bound_fraction = (host_bound_s - self._interval_host_bound_s) / wall_s
        self._interval_since, self._interval_busy_s, self._interval_host_bound_s = now, busy_s, host_bound_s

    def action_times(self, kind: Kind) -> ActionTimes:
        """Of the latest actions of this kind. Synchronises with a GPU."""
        self._busy.wait()
        return ActionTimes.of(self._busy.sections[kind])

    @property
    def interval_bubble(self) -> float:
        """The bubble fraction of the last log interval, of the process; NaN if none has ended yet."""
        return together_idle([self._interval_bubble, *(other._interval_bubble for other in self.beside)])

    @property
    def max_drift(self) -> int:
        """The largest drift since the figures were last taken, in updates."""
        return self._max_drift

    def take_figures(self) -> StageFigures:
        """The figures since the last call; counting starts again from zero."""
        wall_s = time.perf_counter() - self._since
        busy_s, host_bound_s = self._busy.take()
        figures = StageFigures(
            stage_index=self.stage_index,
            updates=self._updates,
            skipped_updates=self._skipped,
            max_drift=self._max_drift,
            mean_drift=self._drift_sum / self._backwards if self._backwards else 0.0,
            max_weight_change=self._max_weight_change,
            mean_weight_change=self._weight_change_sum / self._backwards if self._backwards else 0.0,
            max_in_flight=self._max_in_flight,
            bubble_fraction=max(1.0 - busy_s / wall_s, 0.0),
            host_bound_fraction=host_bound_s / wall_s,
            wall_s=wall_s,
            copied_weight_bytes=self._copied_weight_bytes,
        )
        self.restart()
        return figures

    def restart(self) -> None:
        """Start counting from zero, now."""
        self._busy.take_s()
        self._updates = self._skipped = self._backwards = self._drift_sum = 0
        self._max_drift = self._max_in_flight = self._copied_weight_bytes = 0
        self._max_weight_change = self._weight_change_sum = 0.0
        self._since = self._interval_since = time.perf_counter()
        self._interval_busy_s = self._interval_host_bound_s = self.host_bound_fraction = 0.0
        self._interval_bubble = math.nan
