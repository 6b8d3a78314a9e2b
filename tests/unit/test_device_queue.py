"""With CUDA_DEVICE_MAX_CONNECTIONS=1 a GPU starts its work strictly in the order in which it was queued. Plans still run.

Megatron sets it for tensor parallelism. All streams then share one queue: whatever waits, for a transfer or for the one
before it on the same communicator, holds up everything queued behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import pytest

from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.vee import fold
from tests.support.plans import plans_of

RECEIVES = {Kind.RECV_FORWARD: (-1, Kind.SEND_FORWARD), Kind.RECV_BACKWARD: (1, Kind.SEND_BACKWARD)}
SENDS = {Kind.SEND_FORWARD: (1, Kind.RECV_FORWARD), Kind.SEND_BACKWARD: (-1, Kind.RECV_BACKWARD)}
TRANSFERS = RECEIVES | SENDS
NEEDS = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
RECORDS = {Kind.REPORT: 1, Kind.TOTAL: -1}


def stuck(plans: Sequence[Sequence[Action]], by_direction: bool = True) -> list[Action]:
    """Where the processes' queues stop for good, each strictly in order; empty if all come to their ends.

    A communicator carries its transfers in order: there is one for each link between stages and direction, or one for each
    link. Stages of one process, of which chunk 1 of process r of N is 2N-1-r, hand over without a transfer.
    """
    last = max(action.chunk for plan in plans for action in plan) * len(plans) + len(plans) - 1
    process_of = [min(stage, 2 * len(plans) - 1 - stage) for stage in range(last + 1)]
    position = [0] * len(plans)
    started: list[set[tuple[Kind, int]]] = [set() for _ in process_of]  # by stage

    def counterpart(stage: int, action: Action) -> int | None:
        """The stage at the other end, if it is in another process."""
        other = stage + TRANSFERS[action.kind][0]
        return other if 0 <= other <= last and process_of[other] != process_of[stage] else None

    def is_complete(stage: int, kind: Kind, index: int) -> bool:
        """Whether a transfer of this stage is done: started on both sides."""
        offset, other_kind = TRANSFERS[kind]
        return (kind, index) in started[stage] and (other_kind, index) in started[stage + offset]

    def may_start(stage: int, action: Action) -> bool:
        if action.kind in TRANSFERS:
            if counterpart(stage, action) is None:
                return True
            same = {action.kind} if by_direction else {k for k in TRANSFERS if TRANSFERS[k][0] == TRANSFERS[action.kind][0]}
            return all(is_complete(stage, *earlier) for earlier in started[stage] if earlier[0] in same)
        if action.kind in NEEDS:
            receive = Action(NEEDS[action.kind], action.index)
            offset, sent = TRANSFERS[receive.kind]
            if counterpart(stage, receive) is None:
                return not 0 <= stage + offset <= last or (sent, action.index) in started[stage + offset]
            return is_complete(stage, receive.kind, receive.index)
        if action.kind in RECORDS:
            neighbour = stage + RECORDS[action.kind]
            return not 0 <= neighbour <= last or (action.kind, action.index) in started[neighbour]
        return True

    progress = True
    while progress:
        progress = False
        for process, plan in enumerate(plans):
            while position[process] < len(plan):
                action = plan[position[process]]
                stage = last - process if action.chunk else process
                if not may_start(stage, action):
                    break
                started[stage].add((action.kind, action.index))
                position[process] += 1
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


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8])
@pytest.mark.parametrize("a", [1, 3])
@pytest.mark.parametrize("wait", [0, 1])
def test_a_plan_of_a_v_runs_through_a_single_queue(num_processes: int, a: int, wait: int) -> None:
    folded = fold(num_processes, 1, 2, wait)
    plan = Plan("paci-v", folded.num_stages, a, folded.slack, lambda update: update == 2 * num_processes, folded=folded)
    end = Action(Kind.UPDATE, 2 * num_processes)
    plans = [[*takewhile(lambda each: each != end, plan.process_actions(at)), end] for at in range(num_processes)]
    assert stuck(plans) == []
    late = [sorted(each, key=lambda action: action.kind in RECEIVES) for each in plans]
    assert stuck(late) != [], "receives that are posted when all else is done"
