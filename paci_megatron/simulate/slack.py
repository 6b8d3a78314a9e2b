"""The cheapest slack of the links: what it takes to hide their latency, and uneven times, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from paci_megatron.schedule.schedules import paci, with_transfers

from .costs import Costs
from .engine import simulate

WORTH = 0.02
"""A throughput that is less by no more than this share is worth fewer micro-batches in flight."""

TRIED_ONE_BY_ONE = 8
"""With more links than this that want slack, what is taken away is spread over all of them: there are too many ways."""

Slack = tuple[int, ...]


def cheapest_slack(
    microbatches_per_update: int, costs: Costs, most: int, gradients_ahead: bool = True, worth: float = WORTH
) -> Slack:
    """By link, the slack of at most ``most`` micro-batches in all with nearly the best throughput that so many allow.

    Begins with more than any link can use and takes away one micro-batch after the other, always where it is missed least,
    of equals the one that the most stages hold; ends where a further one would cost more than ``worth``.
    """

    @cache
    def throughput(slack: Slack) -> float:
        return paci_microbatches_per_s(microbatches_per_update, costs, slack, gradients_ahead)

    slack = _useful(costs, most)
    if sum(has > 0 for has in slack) > TRIED_ONE_BY_ONE:
        return _cheapest_share(slack, throughput, most, worth)
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


def _useful(costs: Costs, most: int) -> Slack:
    """By link, more than it can use: a round trip's worth of micro-batches, and one where times are uneven."""
    period_s = max(stage.forward_s + stage.backward_s for stage in costs.stages)
    one_ways = (latency + link for latency, link in zip(costs.latencies_s, costs.links_s, strict=True))
    return tuple(min(math.ceil(2 * one_way / period_s) + (costs.jitter > 0), most) for one_way in one_ways)


def _cheapest_share(wanted: Slack, throughput: Callable[[Slack], float], most: int, worth: float) -> Slack:
    """Of evenly spread shares of ``wanted`` the least with nearly the throughput of the largest that ``most`` allows."""

    def share(total: int) -> Slack:
        before, result = 0, []
        for until in (sum(wanted[: link + 1]) * total // sum(wanted) for link in range(len(wanted))):
            result.append(until - before)
            before = until
        return tuple(result)

    low, high = 0, min(most, sum(wanted))
    enough = (1 - worth) * throughput(share(high))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if throughput(share(middle)) >= enough else (middle + 1, high)
    return share(high)


def paci_microbatches_per_s(microbatches_per_update: int, costs: Costs, slack: Slack, gradients_ahead: bool = True) -> float:
    """PACI's throughput with that slack once it has settled; for ``gradients_ahead`` see :class:`~.schedule.plan.Plan`."""
    n, a = len(costs.stages), microbatches_per_update
    updates = 6 * -(-(n + sum(slack)) // a) + -(-96 // a)
    plans = []
    for stage in range(n):
        actions = paci(stage, n, a, slack=slack)
        if costs.handshakes:
            actions = with_transfers(actions, stage, n, a, slack=slack, gradients_ahead=gradients_ahead)
        plans.append(actions)
    return simulate(plans, costs, last_update=updates).microbatches_per_s(updates // 3)
