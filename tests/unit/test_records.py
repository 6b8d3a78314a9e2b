"""Where reports and totals stand in a plan: known in time on every stage, and never a deadlock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from paci_megatron.schedule import Action, Kind, PlanError, format_actions, paci, validate, with_transfers
from paci_megatron.schedule.records import record_lag, with_records
from paci_megatron.schedule.schedules import IsDrain, even_slack, never

from .test_plan import SIZES, up_to


def plans(num_stages: int, a: int, updates: int, is_drain: IsDrain = never, slack: Sequence[int] = ()) -> list[list[Action]]:
    return [
        up_to(
            with_records(
                with_transfers(paci(s, num_stages, a, is_drain, slack), s, num_stages, a, is_drain, slack),
                num_stages,
                a,
                is_drain,
                slack,
            ),
            updates,
        )
        for s in range(num_stages)
    ]


def test_golden_plan_with_records() -> None:
    compute = [
        format_actions(up_to(with_records(paci(s, 2, 2, lambda k: k == 3), 2, 2, lambda k: k == 3), 3)) for s in range(2)
    ]
    assert compute == [
        "F0 F1 B0 F2 B1 R1 U1 F3 T1 B2 F4 B3 R2 U2 F5 T2 B4 B5 R3 T3 U3",
        "F0 B0 F1 B1 R1 U1 F2 B2 F3 T1 B3 R2 U2 F4 B4 F5 T2 B5 R3 T3 U3",
    ]


@pytest.mark.parametrize(("num_stages", "a"), SIZES)
@pytest.mark.parametrize(("extra", "drains"), [(0, ()), (0, (1, 2, 5)), (1, (3,)), (3, (4, 5)), (20, (2, 7))])
def test_every_stage_knows_the_total_of_lag_updates_ago(
    num_stages: int, a: int, extra: int, drains: tuple[int, ...]
) -> None:
    updates = 2 * num_stages + 5
    drains = (*drains, updates)
    slack = even_slack(num_stages, extra)
    with_drains = plans(num_stages, a, updates, is_drain=lambda k: k in drains, slack=slack)
    validate(with_drains, a, slack, drains)
    for plan in with_drains:
        assert [action.index for action in plan if action.kind is Kind.TOTAL] == list(range(1, updates + 1))


def test_no_smaller_lag_would_do() -> None:
    """The first stages know a total sooner; the lag is the same for all, so it is the last one's."""
    for num_stages, a in itertools.product((2, 4, 8), (1, 2, 3, 8)):
        plan = plans(num_stages, a, 4 * num_stages)[-1]
        known, worst = 0, 0
        for action in plan:
            known = action.index if action.kind is Kind.TOTAL else known
            if action.kind is Kind.UPDATE and action.index > num_stages + 1:
                worst = max(worst, action.index - known)
        assert worst == record_lag(num_stages, a)


def test_validator_wants_totals_in_time() -> None:
    broken = plans(2, 2, 4, is_drain=lambda k: k == 4)
    broken[1] = [action for action in broken[1] if action.kind is not Kind.TOTAL]
    with pytest.raises(PlanError, match=r"stage 1, action U2: total 1 is not known"):
        validate(broken, 2)
