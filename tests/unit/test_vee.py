"""PACI-V: the fold of the pipeline, its plans under every rule of the validator, and what it gives by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from paci_megatron.schedule import Action, Kind, PlanError, format_actions, parse_actions, validate
from paci_megatron.schedule.actions import COMPUTE_KINDS
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.vee import LONGEST, Fold, fold, paci_v, with_messages
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.peers import find_schedule

RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
LENGTHS = [(1, 2, 0), (1, 1, 0), (1, 3, 0), (2, 3, 0), (1, 2, 1), (2, 3, 1)]
"""Of a forward and a backward, and the wait."""


def plans_of(folded: Fold, a: int, drains: Sequence[int]) -> list[list[Action]]:
    """What every process does up to the last of the drains."""
    plans = []
    for process in range(len(folded.begins)):
        computed = paci_v(process, folded, a, drains.__contains__)
        plans.append(up_to(with_messages(computed, process, folded, a, drains.__contains__), drains[-1]))
    return plans


def up_to(actions: Iterable[Action], update: int) -> list[Action]:
    """The actions up to an update of chunk 0, which comes after chunk 1's."""
    taken = []
    for action in actions:
        taken.append(action)
        if action == Action(Kind.UPDATE, update):
            return taken
    raise AssertionError("no such update")


def of_chunk(plan: Sequence[Action], chunk: int) -> list[Action]:
    """What a plan says for one of its stages."""
    return [Action(action.kind, action.index) for action in plan if action.chunk == chunk]


def test_golden_plan_of_two_processes() -> None:
    folded = fold(2)
    assert folded.begins == ((0, 3, 4, 13), (1, 2, 9, 11))
    assert (folded.slack, folded.peak(0), folded.peak(1)) == ((0, -1, 0), 3, 4)
    assert [
        format_actions(action for action in plan if action.kind in COMPUTE_KINDS) for plan in plans_of(folded, 2, (2,))
    ] == [
        "F0 F0.1 B0.1 F1 F1.1 B1.1 U1.1 F2 B0 F2.1 B2.1 F3 B1 U1 F3.1 B3.1 B2 B3 U2.1 U2",
        "F0 F0.1 F1 F1.1 B0.1 B0 F2 F2.1 B1.1 U1.1 B1 U1 F3 F3.1 B2.1 B2 B3.1 B3 U2.1 U2",
    ]
    assert format_actions(plans_of(folded, 2, (2,))[0]) == (
        "F0 SF0 RF0.1 F0.1 B0.1 SB0.1 F1 SF1 RF1.1 F1.1 B1.1 SB1.1 RB0 R1.1 U1.1 F2 SF2 B0 RF2.1 F2.1 B2.1 SB2.1 RB1 F3 SF3 "
        "B1 RF3.1 R1 U1 F3.1 B3.1 SB3.1 RB2 R2.1 B2 RB3 B3 R2 T1 T2 T1.1 T2.1 U2.1 U2"
    )


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_process_fills_its_time_and_never_does_two_things_at_once(
    num_processes: int, lengths: tuple[int, int, int]
) -> None:
    folded = fold(num_processes, *lengths)
    forward, backward, wait = lengths
    for begins in folded.begins:
        busy = [
            (begin + moment) % folded.period
            for begin, length in zip(begins, (forward, forward, backward, backward), strict=True)
            for moment in range(length)
        ]
        assert sorted(busy) == list(range(folded.period))
    way = [begins[0] for begins in folded.begins] + [begins[1] for begins in reversed(folded.begins)]
    back = [begins[2] for begins in folded.begins] + [begins[3] for begins in reversed(folded.begins)]
    for moments, length in ((way, forward), (back, backward)):
        for stage, (before, after) in enumerate(itertools.pairwise(moments)):
            assert after - before - length >= (0 if stage == num_processes - 1 else wait)
    assert back[0] >= way[-1] + forward


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8, 16, 32])
def test_peaks(num_processes: int) -> None:
    def peak(*lengths: int) -> float:
        folded = fold(num_processes, *lengths)
        return max(folded.peak(process) for process in range(num_processes)) / 2

    assert [peak(1, 1), peak(1, 2)] == {
        2: [2, 2], 3: [2, 2.5], 4: [3, 3], 8: [5, 6], 16: [9, 11], 32: [17, 22]
    }[num_processes]  # fmt: skip
    assert peak(1, 2, 1) == num_processes, "with time for transfers a process holds what 1F1B's first stage does"


@pytest.mark.parametrize("num_processes", [2, 3, 5])
@pytest.mark.parametrize("a", [1, 2, 4])
def test_plans_keep_every_rule(num_processes: int, a: int) -> None:
    check_plans(num_processes, a)


@pytest.mark.parametrize("drain", [None, 1, 3])
def test_the_plan_of_a_run_is_that_of_its_processes_and_is_checked(drain: int | None) -> None:
    folded = fold(3)
    plan = Plan("paci-v", folded.num_stages, 2, folded.slack, lambda update: update == drain, folded=folded)
    plan.check()
    expected = plans_of(folded, 2, (drain or 40,))
    for process in range(3):
        own = up_to(plan.process_actions(process), drain or 40)
        assert own[: 4 * 30] == expected[process][: 4 * 30]
        for chunk in (0, 1):
            stage, expected_of_stage = plan.actions(folded.stage_of(process, chunk)), of_chunk(own, chunk)
            assert list(itertools.islice(stage, len(expected_of_stage))) == expected_of_stage


def test_the_plan_of_a_run_with_another_order_is_refused() -> None:
    folded = fold(3)
    plan = Plan("paci-v", folded.num_stages, 2, folded.slack, folded=folded)
    with pytest.raises(PlanError, match="stage 0, action B0: its gradient was never received"):
        replace(plan, folded=replace(folded, begins=folded.begins[::-1])).check()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_processes", range(2, 17))
@pytest.mark.parametrize("a", [1, 2, 3, 4, 8])
def test_plans_of_every_size_keep_every_rule(num_processes: int, a: int) -> None:
    check_plans(num_processes, a)


def check_plans(num_processes: int, a: int) -> None:
    for lengths in LENGTHS:
        folded = fold(num_processes, *lengths)
        lag = record_lag(folded.num_stages, a, folded.slack)
        for drains in ((2 * lag + 2,), (1, 2, 2 * lag + 3), (1, 2, 3)):
            plans = plans_of(folded, a, drains)
            for resident in (True, False):
                validate(plans, a, folded.slack, drains, resident)


@pytest.mark.parametrize("num_processes", [2, 3, 8])
@pytest.mark.parametrize("a", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_stage_does_what_paci_does_with_as_many_in_flight(
    num_processes: int, a: int, lengths: tuple[int, int, int]
) -> None:
    folded = fold(num_processes, *lengths)
    drains = (2, 3, 2 * num_processes + 8)
    stages = Plan("paci", folded.num_stages, a, folded.slack, drains.__contains__)
    for process, plan in enumerate(plans_of(folded, a, drains)):
        for chunk in (0, 1):
            stage = folded.stage_of(process, chunk)
            own = [action for action in of_chunk(plan, chunk) if action.kind not in RECEIVES]
            expected = up_to(stages.actions(stage), drains[-1])
            assert own == [action for action in expected if action.kind not in RECEIVES]
            assert stages.max_in_flight(stage) == folded.in_flight(stage)


@pytest.mark.parametrize(("num_processes", "a"), [(2, 1), (4, 3), (8, 8)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_process_holds_what_the_fold_says_and_drifts_as_far_as_it_may(
    num_processes: int, a: int, lengths: tuple[int, int, int]
) -> None:
    folded = fold(num_processes, *lengths)
    stages = Plan("paci", folded.num_stages, a, folded.slack)
    for process, plan in enumerate(plans_of(folded, a, (40,))):
        held = most = 0
        versions: dict[tuple[int, int], int] = {}
        updates, drift = [0, 0], [0, 0]
        for action in plan:
            key = (action.chunk, action.index)
            if action.kind is Kind.FORWARD:
                held += 1
                versions[key] = updates[action.chunk]
            elif action.kind is Kind.BACKWARD:
                held -= 1
                drift[action.chunk] = max(drift[action.chunk], updates[action.chunk] - versions.pop(key))
            elif action.kind is Kind.UPDATE:
                updates[action.chunk] += 1
            most = max(most, held)
        assert most == folded.peak(process)
        assert drift == [stages.max_drift(folded.stage_of(process, chunk)) for chunk in (0, 1)]


@pytest.mark.parametrize("a", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_process_asks_for_a_drain_when_it_knows_of_all_that_may_have_asked_for_it(
    a: int, lengths: tuple[int, int, int]
) -> None:
    """Who asks in window k is heard by all before any comes to the end of window k + lag + 1."""
    folded = fold(4, *lengths)
    lag = record_lag(folded.num_stages, a, folded.slack)
    known = 0

    def is_drain(update: int) -> bool:
        assert update - lag - 1 <= known
        return update == 30

    for process in range(4):
        known = 0
        for action in with_messages(paci_v(process, folded, a, is_drain), process, folded, a, is_drain):
            if action.kind is Kind.TOTAL and action.chunk == 0:
                known = action.index
            if action == Action(Kind.UPDATE, 30):
                break


def test_receives_posted_one_ahead_would_make_processes_wait_for_each_other() -> None:
    folded = fold(4)
    plans = plans_of(folded, 4, (4,))
    for process, plan in enumerate(plans):
        plans[process] = posted_ahead(plan)
    validate(plans, 4, folded.slack, (4,), resident_transfers=False)
    with pytest.raises(PlanError, match="deadlock: stage 0 at"):
        validate(plans, 4, folded.slack, (4,))


def posted_ahead(plan: Sequence[Action]) -> list[Action]:
    """Each receive where the one before it stood."""
    places: dict[tuple[Kind, int], int] = {}
    moved: list[list[Action]] = [[] for _ in plan]
    for at, action in enumerate(plan):
        if action.kind in RECEIVES:
            way = (action.kind, action.chunk)
            moved[places.get(way, at)].append(action)
            places[way] = at
        else:
            moved[at].append(action)
    return [action for actions in moved for action in actions]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "B0.1 SB0.1 F1 SF1 RF1.1 F1.1",
            "F1 SF1 RF1.1 F1.1 B0.1 SB0.1",
            "stage 3, action F1: 2 micro-batches in flight, at most 1",
        ),
        (" RB0 ", " ", "stage 0, action B0: its gradient was never received"),
    ],
)
def test_validator_refuses_a_broken_plan_of_a_process(old: str, new: str, message: str) -> None:
    folded = fold(2)
    plans = plans_of(folded, 2, (2,))
    text = format_actions(plans[0])
    assert old in text
    plans[0] = parse_actions(text.replace(old, new, 1))
    with pytest.raises(PlanError, match=message):
        validate(plans, 2, folded.slack, (2,))


@pytest.mark.parametrize("num_processes", [4, 8, 16, 32])
def test_no_bubble_in_less_memory_than_1f1b(num_processes: int) -> None:
    costs = Costs((StageCosts(1, 2),) * num_processes)
    run = find_schedule("paci-v").simulate(num_processes, 30, costs)
    assert run.microbatches_per_s(10, 20) * 3 >= 0.99
    assert max(run.peak_activations(process) for process in range(num_processes)) <= 0.8 * num_processes


@pytest.mark.parametrize("num_processes", [4, 8, 16])
def test_with_a_wait_transfers_cost_nothing_and_jitter_little(num_processes: int) -> None:
    def computing(name: str, latency: float = 0, jitter: float = 0) -> float:
        costs = Costs((StageCosts(3, 6),) * num_processes, latency_s=latency, jitter=jitter)
        return find_schedule(name).simulate(num_processes, 30, costs).microbatches_per_s(10, 20) * 9

    # A period is 6 units, and a micro-batch takes a stage 9 s here: a wait of 1 is 1.5 s.
    assert computing("paci-v:1:2:1", latency=1.5) == pytest.approx(1)
    assert computing("paci-v:1:2:1", latency=2.5) < 0.99
    assert computing("paci-v", latency=0.5) < computing("paci", latency=0.5)
    assert computing("paci-v:1:2:1", jitter=0.2) > 0.97 > 0.95 > computing("paci", jitter=0.2)


@pytest.mark.parametrize("arguments", [(2, 0, 2, 0), (2, 1, 0, 0), (2, 1, LONGEST, 0), (2, 1, 2, -1)])
def test_what_is_no_fold_is_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"no V for a forward and backward of .* give whole lengths from 1"):
        fold(*arguments)
    with pytest.raises(ValueError, match="a V of 0 processes: give at least 1"):
        fold(0)
    with pytest.raises(ValueError, match=r"no V for a forward and backward of 1:20 and a wait of 0"):
        find_schedule("paci-v:1:20:0")
