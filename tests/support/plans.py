"""Stages' plans with all that a run adds to them."""

from __future__ import annotations

from itertools import takewhile

from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan


def plans_of(
    num_stages: int, a: int, updates: int, slack: tuple[int, ...] = (), gradients_ahead: bool = False
) -> list[list[Action]]:
    """The actions of all stages from drain to drain."""
    plan = Plan("paci", num_stages, a, slack, lambda update: update == updates, gradients_ahead)
    end = Action(Kind.UPDATE, updates)
    return [[*takewhile(lambda action: action != end, plan.actions(stage)), end] for stage in range(num_stages)]
