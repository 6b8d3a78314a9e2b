"""Stages' plans with all that a run adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan


def plans_of(num_stages: int, a: int, updates: int, extra: int = 0) -> list[list[Action]]:
    """The actions of all stages from drain to drain."""
    plan, end = Plan("paci", num_stages, a, extra, lambda update: update == updates), Action(Kind.UPDATE, updates)
    return [[*takewhile(lambda action: action != end, plan.actions(stage)), end] for stage in range(num_stages)]


def gradients_ahead(plan: Sequence[Action]) -> list[Action]:
    """A plan as it must not be: gradients' receives one micro-batch ahead, as those of activations are."""

    def moved() -> Iterator[Action]:
        receives = iter([action for action in plan if action.kind is Kind.RECV_BACKWARD])
        yet_to_come = True
        for action in plan:
            if action.kind is not Kind.RECV_BACKWARD:
                yield action
            else:
                for _ in range(2 if yet_to_come else 1):
                    yield from (receive for receive in [next(receives, None)] if receive is not None)
                yet_to_come = False

    return list(moved())
