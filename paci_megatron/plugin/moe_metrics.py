"""Mixture-of-experts metrics without stopping the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker


class DrainedMoEMetrics(MoEMetricsTracker):
    """Megatron's tracker, reduced over the stages at drains only, as the mean over the iterations since the last.

    Megatron's own sums every metric over all stages in every iteration. The means appear in the log line, in TensorBoard
    and in Weights & Biases at the iteration of the drain.
    """

    def __init__(self, is_drained: Callable[[], bool]) -> None:
        super().__init__()
        self._is_drained = is_drained
        self._iterations = 0

    def report(self, loss_scale: float, *args: Any, **kwargs: Any) -> str:
        """See ``MoEMetricsTracker.report``; returns nothing for the log, and keeps collecting, between drains."""
        self._iterations += 1
        if not self._is_drained():
            return ""
        kwargs["total_loss_dict"] = None  # which would average over the log interval instead
        kwargs["pg_collection"] = None  # this process's groups: an emulated stage's place in the pipeline is none
        text = super().report(loss_scale / self._iterations, *args, **kwargs)
        self._iterations = 0
        return text
