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

    def __init__(self, drained_iterations: Callable[[], int]) -> None:
        """``drained_iterations`` is :meth:`~.run.Run.drained_iterations`."""
        super().__init__()
        self._drained_iterations = drained_iterations

    def report(self, loss_scale: float, *args: Any, **kwargs: Any) -> str:
        """See ``MoEMetricsTracker.report``; returns nothing for the log, and keeps collecting, between drains."""
        iterations = self._drained_iterations()
        if not iterations:
            return ""
        kwargs["total_loss_dict"] = None  # which would average over the log interval instead
        kwargs["pg_collection"] = None  # this process's groups: an emulated stage's place in the pipeline is none
        return super().report(loss_scale / iterations, *args, **kwargs)
