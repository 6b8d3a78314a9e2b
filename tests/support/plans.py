"""A stage's plan with all that a run adds to it."""

from __future__ import annotations

from paci_megatron.schedule import Action, Kind, paci
from paci_megatron.schedule.records import with_records
from paci_megatron.schedule.schedules import with_transfers


def plan_of(stage: int, num_stages: int, a: int, updates: int) -> list[Action]:
    """The actions of a stage from drain to drain."""

    def is_drain(update: int) -> bool:
        return update == updates

    actions = with_transfers(paci(stage, num_stages, a, is_drain), stage, num_stages, a, is_drain)
    plan = []
    for action in with_records(actions, num_stages, a, is_drain):
        plan.append(action)
        if action == Action(Kind.UPDATE, updates):
            return plan
    raise AssertionError("a plan has no end")
