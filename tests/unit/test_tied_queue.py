"""Tied embeddings' transfers in a GPU's only hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1), and what they cost there.

The last stage posts the receive of a window's gradient long before the first stage sends it. On one communicator the next
such receive would wait for it at the head of the queue, with everything behind it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from paci_megatron.runtime.groups import MAX_TIED_TURNS
from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.schedules import even_slack
from tests.support.plans import plans_of

DURATIONS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0}
OTHER_END = {
    Kind.RECV_FORWARD: (-1, Kind.SEND_FORWARD),
    Kind.SEND_FORWARD: (1, Kind.RECV_FORWARD),
    Kind.RECV_BACKWARD: (1, Kind.SEND_BACKWARD),
    Kind.SEND_BACKWARD: (-1, Kind.RECV_BACKWARD),
}
NEEDS = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
RECORDS = {Kind.REPORT: 1, Kind.TOTAL: -1}

STALLED = {(4, 1), (8, 1), (8, 2), (8, 4)}

Item = tuple[str, int]  # "out" or "in", of a window; an action otherwise


def queue_of(plan: Sequence[Action], stage: int, num_stages: int, ties: bool) -> list[Action | Item]:
    """What a stage queues: its plan, and behind each report of an end both directions of the window's tied gradients."""
    queue: list[Action | Item] = []
    for action in plan:
        queue.append(action)
        if ties and action.kind is Kind.REPORT and stage in (0, num_stages - 1):
            queue += [("out", action.index), ("in", action.index)]
    return queue


def time_per_update(num_stages: int, a: int, turns: int, extra: int = 0, updates: int = 40) -> float:
    """In forwards, in steady state; ``turns`` communicators for each direction of the tied gradients, none if it is 0."""
    slack = even_slack(num_stages, extra)
    plans = plans_of(num_stages, a, updates, slack)
    lag = record_lag(num_stages, a, slack)
    queues = [queue_of(plan, stage, num_stages, turns > 0) for stage, plan in enumerate(plans)]
    started: list[dict[Action | Item, float]] = [{} for _ in plans]
    at, queued_at, computed = [0] * num_stages, [0.0] * num_stages, [0.0] * num_stages

    def done(stage: int, item: Action | Item) -> float | None:
        """When a transfer is complete: both ends have started."""
        if isinstance(item, tuple):
            there, other = num_stages - 1 - stage, ("in" if item[0] == "out" else "out", item[1])
            ends = (started[stage].get(item), started[there].get(other))
        else:
            offset, kind = OTHER_END[item.kind]
            ends = (started[stage].get(item), started[stage + offset].get(Action(kind, item.index)))
        return None if ends[0] is None or ends[1] is None else max(ends[0], ends[1])

    def waits_for(stage: int, item: Action | Item) -> list[float | None]:
        """The moments before which ``item`` may not start, beside its place in the queue."""
        if isinstance(item, tuple):
            earlier = (item[0], item[1] - turns)
            return [done(stage, earlier)] if earlier in started[stage] else []
        moments: list[float | None] = []
        if item.kind in NEEDS and 0 <= stage + OTHER_END[NEEDS[item.kind]][0] < num_stages:
            moments.append(done(stage, Action(NEEDS[item.kind], item.index)))
        elif item.kind in OTHER_END:
            earlier_one = Action(item.kind, item.index - 1)
            moments += [done(stage, earlier_one)] if earlier_one in started[stage] else []
        elif item.kind in RECORDS and 0 <= stage + RECORDS[item.kind] < num_stages:
            moments.append(started[stage + RECORDS[item.kind]].get(item))
        elif item.kind is Kind.UPDATE and turns and stage in (0, num_stages - 1) and item.index > lag:
            moments.append(done(stage, ("in", item.index - lag)))
        return moments

    progress, ends = True, []
    while progress:
        progress = False
        for stage, queue in enumerate(queues):
            while at[stage] < len(queue):
                item = queue[at[stage]]
                moments = waits_for(stage, item)
                if None in moments:
                    break
                computes = isinstance(item, Action) and (item.kind in DURATIONS or item.kind is Kind.UPDATE)
                # A transfer is ordered behind the computing so far, as computing is.
                begin = max([queued_at[stage], computed[stage], *(moment for moment in moments if moment is not None)])
                started[stage][item] = queued_at[stage] = begin
                if isinstance(item, Action):
                    computed[stage] = begin + DURATIONS.get(item.kind, 0.0) if computes else computed[stage]
                    if item.kind is Kind.UPDATE and stage == 0:
                        ends.append(begin)
                at[stage] += 1
                progress = True
    assert all(position == len(queue) for position, queue in zip(at, queues, strict=True)), "the queues are stuck"
    return (ends[-10] - ends[9]) / (len(ends) - 19)


@pytest.mark.parametrize(("num_stages", "a"), itertools.product((2, 3, 4, 8), (1, 2, 4, 8)))
def test_as_many_communicators_as_updates_until_both_ends_have_met_cost_nothing(num_stages: int, a: int) -> None:
    alone = time_per_update(num_stages, a, turns=0)
    for extra in (0, 1, num_stages - 1):
        assert time_per_update(num_stages, a, 0, extra) == pytest.approx(3 * a, rel=0.01)
        turns = min(record_lag(num_stages, a, even_slack(num_stages, extra)), MAX_TIED_TURNS)
        assert time_per_update(num_stages, a, turns, extra) <= 1.02 * alone
    if (num_stages, a) in STALLED:
        assert time_per_update(num_stages, a, turns=1) > 1.05 * alone, "one communicator stalls the queue"
