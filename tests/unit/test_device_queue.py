"""With CUDA_DEVICE_MAX_CONNECTIONS=1 a GPU starts its work strictly in the order in which it was queued. Plans still run.

Megatron sets it for tensor parallelism. All streams then share one queue: whatever waits, for a transfer or for the one
before it on the same communicator, holds up everything queued behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paci_megatron.schedule import Action, Kind
from tests.support.plans import plans_of

RECEIVES = {Kind.RECV_FORWARD: (-1, Kind.SEND_FORWARD), Kind.RECV_BACKWARD: (1, Kind.SEND_BACKWARD)}
SENDS = {Kind.SEND_FORWARD: (1, Kind.RECV_FORWARD), Kind.SEND_BACKWARD: (-1, Kind.RECV_BACKWARD)}
TRANSFERS = RECEIVES | SENDS
NEEDS = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
RECORDS = {Kind.REPORT: 1, Kind.TOTAL: -1}


def stuck(plans: Sequence[Sequence[Action]], by_direction: bool = True) -> list[Action]:
    """Where the stages' queues stop for good, each strictly in order; empty if all come to their ends.

    A communicator carries its transfers in order: there is one for each pair of stages and direction, or one for each pair.
    """
    position = [0] * len(plans)
    started: list[set[Action]] = [set() for _ in plans]

    def is_complete(stage: int, action: Action) -> bool:
        """Whether a transfer of this stage is done: started on both sides."""
        offset, counterpart = TRANSFERS[action.kind]
        return action in started[stage] and Action(counterpart, action.index) in started[stage + offset]

    def may_start(stage: int, action: Action) -> bool:
        if action.kind in TRANSFERS:
            same = {action.kind} if by_direction else {k for k in TRANSFERS if TRANSFERS[k][0] == TRANSFERS[action.kind][0]}
            return all(is_complete(stage, earlier) for earlier in started[stage] if earlier.kind in same)
        if action.kind in NEEDS:
            receive = Action(NEEDS[action.kind], action.index)
            return not 0 <= stage + RECEIVES[receive.kind][0] < len(plans) or is_complete(stage, receive)
        if action.kind in RECORDS:
            neighbour = stage + RECORDS[action.kind]
            return not 0 <= neighbour < len(plans) or action in started[neighbour]
        return True

    progress = True
    while progress:
        progress = False
        for stage, plan in enumerate(plans):
            while position[stage] < len(plan) and may_start(stage, plan[position[stage]]):
                started[stage].add(plan[position[stage]])
                position[stage] += 1
                progress = True
    return [plan[at] for plan, at in zip(plans, position, strict=True) if at < len(plan)]


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("a", [1, 2, 3, 8])
def test_a_plan_runs_through_a_single_queue(num_stages: int, a: int) -> None:
    plans = plans_of(num_stages, a, updates=6)
    assert stuck(plans) == []
    # Gradients posted ahead need a group of their own: such a receive would hold up a send to the same stage.
    ahead = plans_of(num_stages, a, updates=6, gradients_ahead=True)
    assert stuck(ahead) == []
    assert stuck(ahead, by_direction=False) != []
