"""Plans: the rules of the schedule, exact golden text, and the validator's own eyes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest

from paci_megatron.schedule import (
    Action,
    Kind,
    PlanError,
    format_actions,
    one_f_one_b_flush,
    paci,
    parse_actions,
    validate,
    with_transfers,
)
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import (
    IsDrain,
    even_slack,
    lead_of_previous,
    max_drift,
    max_in_flight,
    never,
    parse_slack,
)

SIZES = list(itertools.product((1, 2, 3, 4, 7, 8, 16), (1, 2, 3, 4, 7, 8, 16)))


def up_to(actions: Iterable[Action], update: int) -> list[Action]:
    taken = []
    for action in actions:
        taken.append(action)
        if action == Action(Kind.UPDATE, update):
            return taken
    raise AssertionError("no such update")


def plans(num_stages: int, a: int, updates: int, is_drain: IsDrain = never, slack: Sequence[int] = ()) -> list[list[Action]]:
    return [
        up_to(with_transfers(paci(s, num_stages, a, is_drain, slack), s, num_stages, a, is_drain, slack), updates)
        for s in range(num_stages)
    ]


def test_golden_plan_of_four_stages_two_microbatches_per_update() -> None:
    compute = [format_actions(up_to(paci(s, 4, 2, lambda k: k == 3), 3)) for s in range(4)]
    assert compute == [
        "F0 F1 F2 F3 B0 F4 B1 U1 F5 B2 B3 U2 B4 B5 U3",
        "F0 F1 F2 B0 F3 B1 U1 F4 B2 F5 B3 U2 B4 B5 U3",
        "F0 F1 B0 F2 B1 U1 F3 B2 F4 B3 U2 F5 B4 B5 U3",
        "F0 B0 F1 B1 U1 F2 B2 F3 B3 U2 F4 B4 F5 B5 U3",
    ]


def test_golden_transfers_of_a_middle_stage() -> None:
    actions = with_transfers(paci(1, 3, 2, lambda k: k == 2), 1, 3, 2, lambda k: k == 2)
    assert format_actions(up_to(actions, 2)) == (
        "RF0 RF1 F0 SF0 RF2 F1 SF1 RB0 B0 SB0 RF3 F2 SF2 RB1 B1 SB1 U1 F3 SF3 RB2 B2 SB2 RB3 B3 SB3 U2"
    )


@pytest.mark.parametrize(("num_stages", "a"), SIZES)
@pytest.mark.parametrize("extra", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("drains", [(6,), (1, 2, 3, 4, 5, 6), (2, 6), (3, 4, 6)])
def test_plans_keep_every_rule(num_stages: int, a: int, extra: int, drains: tuple[int, ...]) -> None:
    slack = even_slack(num_stages, extra)
    validate(plans(num_stages, a, 6, lambda k: k in drains, slack), a, slack, drains)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("a", [1, 2, 3, 4])
@pytest.mark.parametrize("gradients_ahead", [False, True])
def test_plans_keep_every_rule_whatever_slack_each_link_has(num_stages: int, a: int, gradients_ahead: bool) -> None:
    for slack in itertools.product((0, 1, 4), repeat=num_stages - 1):
        plan = Plan("paci", num_stages, a, slack, never, gradients_ahead)
        plan.check()
        replace(plan, is_drain=lambda update: update in (2, 3, 6)).check()
        held = [plan.max_in_flight(stage) for stage in range(num_stages)]
        assert [before - after - 1 for before, after in itertools.pairwise(held)] == list(slack)
        assert held[-1] == 1
        for stage in range(num_stages):
            # Both bounds are met: no smaller one would do.
            actions = up_to(plan.actions(stage), 3 * plan.record_lag + 3)
            assert most_in_flight_and_drift(actions) == (held[stage], plan.max_drift(stage))


def most_in_flight_and_drift(actions: Iterable[Action]) -> tuple[int, int]:
    versions: dict[int, int] = {}
    updates = most = drift = 0
    for action in actions:
        if action.kind is Kind.FORWARD:
            versions[action.index] = updates
        elif action.kind is Kind.BACKWARD:
            drift = max(drift, updates - versions.pop(action.index))
        updates += action.kind is Kind.UPDATE
        most = max(most, len(versions))
    return most, drift


def test_slack_is_one_number_spread_evenly_or_one_for_each_link() -> None:
    assert parse_slack("0", 1) == () and parse_slack("4", 2) == (4,)
    assert parse_slack("3", 4) == (1, 1, 1) == even_slack(4, 3)
    assert parse_slack("0,4,0", 4) == (0, 4, 0)
    for text in ("-1", "1.5", "", "1,", "1,2", "many"):
        with pytest.raises(ValueError, match=re.escape(f"{text}: ")):
            parse_slack(text, 4)
    with pytest.raises(PlanError, match="slack of 2 links for 4 stages: give 3 numbers, or none"):
        Plan("paci", 4, 2, (1, 2)).check()


@pytest.mark.parametrize("num_stages", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("extra", [0, 1, 2, 5, 7, 15, 16, 40])
def test_extra_micro_batches_fall_evenly_to_the_last_stage(num_stages: int, extra: int) -> None:
    slack = even_slack(num_stages, extra)
    held = [max_in_flight(stage, num_stages, slack) for stage in range(num_stages)]
    assert (held[0], held[-1]) == (num_stages + extra, 1)
    leads = [lead_of_previous(stage, slack) for stage in range(1, num_stages)]
    assert leads == [before - after for before, after in itertools.pairwise(held)]
    assert max(leads) - min(leads) <= 1
    assert min(leads) >= 1, "a following stage never has as many in flight, so it never waits for ever"


@pytest.mark.parametrize(("num_stages", "a"), SIZES)
def test_a_drain_at_every_update_is_1f1b_flush(num_stages: int, a: int) -> None:
    for stage in range(num_stages):
        flush = up_to(one_f_one_b_flush(stage, num_stages, a), 3)
        assert up_to(paci(stage, num_stages, a, lambda k: True), 3) == flush


@pytest.mark.parametrize(("num_stages", "a"), SIZES)
def test_drift_reaches_its_bound_and_averages_to_n_minus_1_minus_s_over_a(num_stages: int, a: int) -> None:
    for stage in range(num_stages):
        versions, drifts, updates = {}, [], 0
        for action in up_to(paci(stage, num_stages, a), 60):
            if action.kind is Kind.FORWARD:
                versions[action.index] = updates
            elif action.kind is Kind.BACKWARD:
                drifts.append(updates - versions.pop(action.index))
            else:
                updates += 1
        steady = drifts[20 * a :]
        assert max(drifts) == max_drift(stage, num_stages, a) == math.ceil((num_stages - 1 - stage) / a)
        assert sum(steady) * a == (num_stages - 1 - stage) * len(steady)


def test_text_form_parses_back() -> None:
    actions = up_to(with_transfers(paci(1, 3, 2), 1, 3, 2), 4)
    assert parse_actions(format_actions(actions)) == actions
    with pytest.raises(ValueError, match=r"'X3' is no action.*like F3"):
        Action.parse("X3")


def broken(old: str, new: str, stage: int = 0) -> list[list[Action]]:
    """Two stages, two micro-batches per update, drained at update 2, with a mistake in one stage."""
    right = [format_actions(plan) for plan in plans(2, 2, 2, lambda k: k == 2)]
    assert old in right[stage]
    right[stage] = right[stage].replace(old, new)
    return [parse_actions(text) for text in right]


@pytest.mark.parametrize(
    ("old", "new", "stage", "message"),
    [
        ("F1 SF1 RB0", "F1 SF1 F2 SF2 RB0", 0, r"stage 0, action F2: 3 micro-batches in flight, at most 2"),
        (" B0 ", " B1 ", 0, r"stage 0, action B1: out of order, B0 is next"),
        (" B1 U1", " U1 B1", 0, r"stage 0, action U1: after 1 backwards"),
        (" RB0 ", " ", 0, r"stage 0, action B0: its gradient was never received"),
        ("RF0 RF1 F0", "F0 RF0 RF1", 1, r"stage 1, action F0: its activation was never received"),
        (" SB0 ", " ", 1, r"stage 1, action SB1: out of order, SB0 is next"),
        (" SF1 ", " ", 0, r"stage 0, action SF2: out of order, SF1 is next"),
    ],
)
def test_validator_refuses_a_broken_plan_and_shows_it(old: str, new: str, stage: int, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        validate(broken(old, new, stage), 2, drains=(2,))
    assert "stage 0: F0" in str(caught.value), "the plans are shown"


def test_validator_finds_a_deadlock() -> None:
    mutual = [
        parse_actions("F0 SF0 RB0 B0 U1"),
        parse_actions("RF0 RF1 F0 B0 SB0 U1 F1 B1 SB1 U2"),
    ]
    with pytest.raises(PlanError, match="deadlock: stage 0 at B0, stage 1 at F0 wait for ever"):
        validate(mutual, 1)


def test_validator_finds_what_is_left_at_a_drain() -> None:
    with pytest.raises(PlanError, match=r"stage 0, action U1: not drained, micro-batches reached: \[2, 3\]"):
        validate(plans(2, 2, 2), 2, drains=(1,))


@pytest.mark.parametrize("schedule", ["paci", "1f1b"])
@pytest.mark.parametrize(("num_stages", "a", "extra"), [(2, 1, 0), (4, 3, 3), (8, 2, 7), (8, 16, 0)])
def test_a_plan_that_a_run_makes_passes_its_own_check(schedule: str, num_stages: int, a: int, extra: int) -> None:
    slack = even_slack(num_stages, extra) if schedule == "paci" else ()
    for gradients_ahead in (False, True):
        Plan(schedule, num_stages, a, slack, never, gradients_ahead).check()
        Plan(schedule, num_stages, a, slack, lambda update: update in (1, 2, 5), gradients_ahead).check()


def test_a_plan_that_breaks_a_rule_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(stage_index: int, num_stages: int, a: int, is_drain: IsDrain, slack: Sequence[int]) -> Iterator[Action]:
        return paci(max(stage_index - 1, 0), num_stages, a, is_drain, slack)  # each stage takes what the one before may

    monkeypatch.setattr("paci_megatron.schedule.plan.paci", greedy)
    with pytest.raises(PlanError, match="stage 1, action F3: 4 micro-batches in flight, at most 3"):
        Plan("paci", 4, 8).check()
