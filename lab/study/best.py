"""Each schedule at its own best learning rate, as rows of ``report.json``."""

from __future__ import annotations

import dataclasses
import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from . import statistics as st
from .arms import Arm

if TYPE_CHECKING:
    from .analysis import Analysis


def best_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """A row for all arms that differ in the rate only, where there are several rates: every rate's perplexity, and the best
    rate's against flush's best, both with the same optimizer.
    """
    groups: dict[Arm, list[Arm]] = {}
    for arm in analysis.arms:
        groups.setdefault(dataclasses.replace(arm, lr_factor=1.0), []).append(arm)
    several = {group: arms for group, arms in groups.items() if len(arms) > 1}
    best = {group: min(arms, key=lambda arm: _loss(analysis, arm, arms)) for group, arms in several.items()}
    rows = []
    for group in sorted(several, key=lambda g: (g.optimizer, g.bf16, g.is_flush is False, g.microbatches_per_update)):
        same = (group.batch_size, group.optimizer, group.beta1, group.bf16)
        flush = next((best[g] for g in best if g.is_flush and (g.batch_size, g.optimizer, g.beta1, g.bf16) == same), None)
        rows.append(_row(analysis, group, several[group], best[group], flush))
    return rows


def _loss(analysis: Analysis, arm: Arm, arms: list[Arm]) -> float:
    """The validation loss over the seeds that all ``arms`` have."""
    common = set.intersection(*({run.seed for run in analysis.by_arm[other]} for other in arms))
    runs = [run for run in analysis.by_arm[arm] if run.seed in common] or analysis.by_arm[arm]
    return fmean(run.final_loss() for run in runs)


def _row(analysis: Analysis, group: Arm, arms: list[Arm], best: Arm, flush: Arm | None) -> dict[str, Any]:
    factors = sorted(arm.lr_factor for arm in arms)
    runs = analysis.by_arm[best]
    row = {
        "arms": group.name,
        "optimizer": group.optimizer,
        "perplexity_by_lr_factor": {a.lr_factor: math.exp(_loss(analysis, a, arms)) for a in arms},
        "best_lr_factor": best.lr_factor,
        "best_lr": analysis.study.lr(best),
        "is_at_the_edge": best.lr_factor in (factors[0], factors[-1]),
        "seeds": [run.seed for run in runs],
        "validation_perplexity": st.spread([math.exp(run.final_loss()) for run in runs])._asdict(),
        "max_drift": max(run.max_drift() for run in runs),
        "weight_change": next((run.weight_change() for run in runs if run.weight_change() is not None), None),
        "against_best_flush": None,
    }
    if flush is not None and flush is not best:
        row["against_best_flush"] = analysis.difference(best, flush)
        row |= _times(analysis, best, flush)
    return row


def _times(analysis: Analysis, arm: Arm, flush: Arm) -> dict[str, Any]:
    """When both are at the last perplexity that both reach, each at its own best rate, with the same micro-batches."""
    curve = analysis.curve(arm)
    own = analysis.curve(flush, dataclasses.replace(flush, microbatches_per_update=arm.microbatches_per_update))
    perplexity = st.thresholds([0.0], max(min(point.loss for point in each) for each in (curve, own)))[-1]
    seconds, flush_seconds = st.time_to(curve, perplexity), st.time_to(own, perplexity)
    speedup = flush_seconds / seconds if seconds and flush_seconds else None
    return {"perplexity": perplexity, "seconds": seconds, "flush_seconds": flush_seconds, "speedup": speedup}
