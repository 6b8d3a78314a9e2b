"""What a rank is asked to measure, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .padding import StageTimes


@dataclass(frozen=True)
class Job:
    """A training to measure. ``stage_times``, one a stage, pads its actions; without it compute is real.

    ``measures_memory`` measures what is held for backwards in place of times, since that takes time itself.
    """

    argv: tuple[str, ...]
    microbatches_per_update: int
    warmup: int = 0
    iterations: int = 0
    stage_times: tuple[StageTimes, ...] | None = None
    is_bare: bool = False
    measures_memory: bool = False


@dataclass
class RankResult:
    """What one rank measured. ``ends_s`` are the ends of all iterations, on the machine's monotonic clock. What follows
    is of the measured iterations: seconds of a micro-batch's forward and backward (all chunks) and of an update, the
    share of the time spent in them, and how many of the timed actions computed for longer than they had time.
    """

    stage_index: int
    ends_s: list[float] = field(default_factory=list)
    forward_s: float = 0.0
    backward_s: float = 0.0
    update_s: float = 0.0
    utilization: float = 0.0
    max_drift: int = 0
    actions: int = 0
    overruns: int = 0
    peak_activation_bytes: int = 0
    slack: tuple[int, ...] = ()  # of the links, at the end
    peak_allocated_bytes: int | None = None  # by an accelerator's allocator
