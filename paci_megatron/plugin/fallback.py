"""When training goes wrong, for ``--paci-fallback``."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

SPIKE_WINDOW = 100
SPIKE_AFTER = 20
SPIKE_DEVIATIONS = 6.0


class SpikeDetector:
    """Tells a loss that jumps: more than 6 standard deviations above the mean of the 100 before it, or not finite."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """``losses`` are those remembered before a checkpoint."""
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` jumps; it is remembered if it does not. The first 20 only count if they are not finite."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) >= SPIKE_AFTER:
            spread = max(statistics.pstdev(self._losses), 1e-3)
            if loss > statistics.fmean(self._losses) + SPIKE_DEVIATIONS * spread:
                return True
        self._losses.append(loss)
        return False

    def to_save(self) -> list[float]:
        """What is remembered, for a checkpoint."""
        return list(self._losses)
