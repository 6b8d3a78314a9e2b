"""Means, spreads and curves. Nothing here knows what the numbers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple


class Spread(NamedTuple):
    """A mean and the sample standard deviation around it, None of a single value."""

    mean: float
    std: float | None
    number: int


class Point(NamedTuple):
    """One evaluation: validation loss after so many tokens and seconds."""

    tokens: int
    seconds: float
    loss: float


Curve = list[Point]


def spread(values: Sequence[float]) -> Spread:
    """The mean and spread of one value or more."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean loss and time over ``curves`` at the numbers of tokens that all of them have."""
    common = set.intersection(*({point.tokens for point in curve} for curve in curves))
    kept = [[point for point in curve if point.tokens in common] for curve in curves]
    return [
        Point(points[0].tokens, fmean(p.seconds for p in points), fmean(p.loss for p in points))
        for points in zip(*kept, strict=True)
    ]


def time_to(curve: Curve, perplexity: float) -> float | None:
    """The seconds until the curve first has at most this perplexity; None if it never has.

    Between two evaluations the loss is taken as linear in time. A curve that begins below has no earlier evaluation to
    count from, and gives the time of its first.
    """
    target = math.log(perplexity)
    for index, point in enumerate(curve):
        if point.loss <= target:
            if index == 0:
                return point.seconds
            before = curve[index - 1]
            share = (before.loss - target) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
    return None


def spread_over_runs(series: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation over runs at each place of their series, its mean over the places; None of one run."""
    if len(series) < 2:
        return None
    return fmean(stdev(values) for values in zip(*series, strict=True))


def thresholds(losses: Sequence[float], reachable: float, count: int = 4) -> list[float]:
    """Round perplexities, falling, between the middle of a falling loss curve and ``reachable``, a loss that all reach."""
    begin = losses[len(losses) // 3]
    if reachable >= begin:
        return [_rounded_up(math.exp(reachable))]
    losses_at = (begin + (reachable - begin) * k / (count - 1) for k in range(count))
    return list(dict.fromkeys(_rounded_up(math.exp(loss)) for loss in losses_at))


def _rounded_up(value: float) -> float:
    """The next number of three digits, so that what reaches ``value`` reaches it."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(math.ceil(value / unit - 1e-9) * unit, 6)
