"""On a GPU a pending transfer is a kernel that stays until its other end comes. What needs the whole device waits for it.

Cooperative launches, a synchronisation of the device and the freeing of memory do. A plan must come to its end whichever of
its actions need the whole device, and also where it is sends that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from paci_megatron.schedule import Action, Kind, PlanError, validate
from paci_megatron.schedule.actions import TRANSFER_KINDS
from paci_megatron.schedule.schedules import even_slack
from tests.support.plans import plans_of

RECEIVES = {Kind.RECV_FORWARD: (-1, Kind.SEND_FORWARD), Kind.RECV_BACKWARD: (1, Kind.SEND_BACKWARD)}
SENDS = {Kind.SEND_FORWARD: (1, Kind.RECV_FORWARD), Kind.SEND_BACKWARD: (-1, Kind.RECV_BACKWARD)}
NEEDS = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
RECORDS = {Kind.REPORT: 1, Kind.TOTAL: -1}
UPDATES = 5

EVEN = [(n, a, even_slack(n, k)) for n in (2, 3, 4, 8) for a in (1, 2, 4, 8) for k in sorted({0, 1, n - 1})]
UNEVEN = [(len(slack) + 1, a, slack) for slack in ((0, 3, 0), (2, 0, 5), (4, 0)) for a in (1, 2, 4, 8)]
NeedsDevice = Callable[[int, Action], bool]


def stuck(plans: Sequence[Sequence[Action]], needs_device: NeedsDevice, sends_stay: bool) -> list[str]:
    """Where stages wait for ever. Transfers are known one by one here, not by their number as in the validator."""
    position = [0] * len(plans)
    done: list[set[Action]] = [set() for _ in plans]
    resident: list[set[Action]] = [set() for _ in plans]

    def is_complete(stage: int, transfer: Action) -> bool:
        offset, counterpart = (RECEIVES | SENDS)[transfer.kind]
        return Action(counterpart, transfer.index) in done[stage + offset]

    def may_run(stage: int, action: Action) -> bool:
        if action.kind in RECORDS:
            neighbour = stage + RECORDS[action.kind]
            if 0 <= neighbour < len(plans) and action not in done[neighbour]:
                return False
        if action.kind in NEEDS:
            receive = Action(NEEDS[action.kind], action.index)
            if receive in resident[stage] and not is_complete(stage, receive):
                return False
        return not needs_device(stage, action) or all(is_complete(stage, transfer) for transfer in resident[stage])

    progress = True
    while progress:
        progress = False
        for stage, plan in enumerate(plans):
            while position[stage] < len(plan) and may_run(stage, action := plan[position[stage]]):
                done[stage].add(action)
                if action.kind in RECEIVES or (sends_stay and action.kind in SENDS):
                    resident[stage].add(action)
                position[stage] += 1
                progress = True
    return [
        f"stage {stage} at {plan[at]}"
        for stage, (plan, at) in enumerate(zip(plans, position, strict=True))
        if at < len(plan)
    ]


def every(stage: int, action: Action) -> bool:
    return action.kind not in TRANSFER_KINDS


def backwards(stage: int, action: Action) -> bool:
    return action.kind is Kind.BACKWARD


@pytest.mark.parametrize(("num_stages", "a", "slack"), [*EVEN, *UNEVEN])
@pytest.mark.parametrize("sends_stay", [False, True])
def test_no_stage_waits_for_ever_whatever_needs_the_whole_device(
    num_stages: int, a: int, slack: tuple[int, ...], sends_stay: bool
) -> None:
    plans, random = plans_of(num_stages, a, UPDATES, slack), Random(a)
    some = {
        (stage, action)
        for stage, plan in enumerate(plans)
        for action in plan
        if every(stage, action) and random.random() < 0.3
    }
    for needs in (every, backwards, lambda stage, action: (stage, action) in some):
        assert stuck(plans, needs, sends_stay) == []
    validate(plans, a, slack, drains=(UPDATES,))


@pytest.mark.parametrize(("num_stages", "a", "slack"), EVEN)
def test_with_both_directions_posted_ahead_neighbours_wait_for_each_other(
    num_stages: int, a: int, slack: tuple[int, ...]
) -> None:
    plans = plans_of(num_stages, a, UPDATES, slack, gradients_ahead=True)
    assert stuck(plans, every, sends_stay=False) != []
    assert stuck(plans, backwards, sends_stay=False) != []
    with pytest.raises(PlanError, match="deadlock: stage 0 at B0"):
        validate(plans, a, slack, drains=(UPDATES,))
    validate(plans, a, slack, drains=(UPDATES,), resident_transfers=False)
