"""Where in a plan the stages tell each other about an update: sums over all stages, without a collective.

Beside the gradient of a window's last micro-batch a REPORT goes up, to the previous stage: each stage adds its own numbers
to those of the later stages, so that stage 0 has the total. Beside the activation of the first micro-batch that stage 0
forwards after its update, the TOTAL goes down, to the next stage. Both stand at fixed places of the plan, where what they
wait for is under way already: no stage stops for them, and nothing depends on timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .actions import Action, Kind
from .schedules import IsDrain, max_in_flight, never


def record_lag(num_stages: int, microbatches_per_update: int, slack: Sequence[int] = ()) -> int:
    """After how many updates every stage knows an update's total: ceil(C/a), where the first stage has C micro-batches in
    flight. At a drained update it is 0.
    """
    return -(-max_in_flight(0, num_stages, slack) // microbatches_per_update)


def with_records(
    actions: Iterable[Action],
    num_stages: int,
    microbatches_per_update: int,
    is_drain: IsDrain = never,
    slack: Sequence[int] = (),
) -> Iterator[Action]:
    """``actions`` of any stage, transfers included, with REPORT(k) before each UPDATE(k), and the TOTALs.

    TOTAL(k) follows the forward, and the sending, of micro-batch ka-1+C, where the first stage has C in flight. At a drain
    there is none, and the totals not yet delivered stand before the update, which can then use its own.
    """
    a, in_flight = microbatches_per_update, max_in_flight(0, num_stages, slack)
    next_total = 1
    due = False
    for action in actions:
        if due and action.kind is not Kind.SEND_FORWARD:
            yield Action(Kind.TOTAL, next_total)
            next_total += 1
            due = False
        if action.kind is Kind.UPDATE:
            yield Action(Kind.REPORT, action.index)
            if is_drain(action.index):
                while next_total <= action.index:
                    yield Action(Kind.TOTAL, next_total)
                    next_total += 1
        yield action
        if action.kind is Kind.FORWARD:
            due = action.index == next_total * a - 1 + in_flight
