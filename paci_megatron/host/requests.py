"""What a stage asks of all the others: to drain soon, because the job is to stop or training goes wrong."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

from paci_megatron.runtime.control import Request

if TYPE_CHECKING:
    from .stage import Stage

SPIKE_WINDOW = 100
SPIKE_AFTER = 20
SPIKE_DEVIATIONS = 6.0


class SpikeDetector:
    """Tells a loss that jumps: more than 6 standard deviations above the mean of the 100 before it, or not finite."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

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


def can_request(args: argparse.Namespace) -> bool:
    """Whether this run's arguments let a stage ask for anything."""
    return bool(args.exit_signal_handler or args.exit_duration_in_mins or args.paci_fallback)


def requests(stage: Stage) -> Request:
    """What ``stage`` asks of all, as its window ends."""
    from megatron.training import get_args, get_signal_handler, training

    args = get_args()
    asked = Request.NONE
    # The handler's own method asks all ranks.
    if args.exit_signal_handler and get_signal_handler()._signal_received:
        asked |= Request.EXIT
    if args.exit_duration_in_mins and time.time() - training._TRAIN_START_TIME > 60 * args.exit_duration_in_mins:
        asked |= Request.EXIT
    if args.paci_fallback and stage.is_last and stage.loss_jumped():
        asked |= Request.FALLBACK
    return asked
