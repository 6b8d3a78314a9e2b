"""The cheapest slack of the links: what it takes to hide their latency, and uneven times, and no more."""

from __future__ import annotations

import math
from functools import cache

from paci_megatron.schedule.schedules import paci, with_transfers

from .costs import Costs
from .engine import simulate

WORTH = 0.02
"""A throughput that is less by no more than this share is worth fewer micro-batches in flight."""


def cheapest_slack(microbatches_per_update: int, costs: Costs, most: int, worth: float = WORTH) -> tuple[int, ...]:
    """By link, the slack of at most ``most`` micro-batches in all with nearly the best throughput that so many allow.

    Begins with more than any link can use and takes away one micro-batch after the other, always where it is missed least,
    of equals the one that the most stages hold; ends where a further one would cost more than ``worth``.
    """
    stages = costs.stages
    period_s = max(stage.forward_s + stage.backward_s for stage in stages)

    @cache
    def throughput(slack: tuple[int, ...]) -> float:
        return paci_microbatches_per_s(microbatches_per_update, costs, slack)

    round_trips = (latency + link for latency, link in zip(costs.latencies_s, costs.links_s, strict=True))
    slack = tuple(math.ceil(2 * one_way / period_s) + (costs.jitter > 0) for one_way in round_trips)
    best = throughput(slack) if sum(slack) <= most else 0.0
    while any(slack):
        fewer = [tuple(n - (at == link) for at, n in enumerate(slack)) for link, has in enumerate(slack) if has]
        # Of equals the last link's: all stages before it hold its micro-batches.
        candidate = max(reversed(fewer), key=lambda less: round(throughput(less), 9))
        if sum(slack) <= most:
            best = max(best, throughput(slack))
            if throughput(candidate) < (1 - worth) * best:
                break
        slack = candidate
    return slack


def paci_microbatches_per_s(microbatches_per_update: int, costs: Costs, slack: tuple[int, ...], updates: int = 0) -> float:
    """PACI's throughput with that slack, of the last two thirds of ``updates`` (0: as many as it takes to settle)."""
    n, a = len(costs.stages), microbatches_per_update
    updates = updates or 6 * -(-(n + sum(slack)) // a) + -(-96 // a)
    plans = []
    for stage in range(n):
        actions = paci(stage, n, a, slack=slack)
        plans.append(
            with_transfers(actions, stage, n, a, slack=slack, gradients_ahead=True) if costs.handshakes else actions
        )
    return simulate(plans, costs, last_update=updates).microbatches_per_s(updates // 3)
