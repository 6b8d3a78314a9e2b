"""Slow links in the simulator, the cheapest slack that hides them, and what a run makes of what it measured."""

from __future__ import annotations

from typing import Any

import pytest

from paci_megatron.config import Extra, PaciConfig
from paci_megatron.plugin.slack_choice import Measured, SlackChoices, choice_line, costs_of
from paci_megatron.runtime.link_times import LinkTimes
from paci_megatron.runtime.meters import ActionTimes
from paci_megatron.schedule import parse_actions
from paci_megatron.schedule.plan import Plan
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import simulate
from paci_megatron.simulate.peers import find_schedule
from paci_megatron.simulate.slack import cheapest_slack, paci_microbatches_per_s

STAGE = StageCosts(30, 60)
DELAY = 20


def pipeline(num_stages: int, **costs: float | tuple[float, ...]) -> Costs:
    return Costs((STAGE,) * num_stages, handshakes=True, **costs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "arrives"),
    [
        ("RF0 W9 F0", 30 + DELAY),  # the receive was posted long before
        ("W9 RF0 F0", 30 + DELAY + DELAY),  # posted just as the message is ready (W takes 30): its sender must hear of it
    ],
)
def test_with_handshakes_a_message_leaves_when_its_sender_knows_of_the_receive(second: str, arrives: float) -> None:
    plans = [parse_actions("F0 SF0"), parse_actions(second)]
    assert simulate(plans, pipeline(2, latency_s=DELAY)).makespan_s == arrives + 30


def test_a_flush_over_a_slow_link_waits_for_sends_and_for_the_collectives_of_the_update() -> None:
    """Two stages, one micro-batch: an activation and a gradient, and five all-reduces of two messages."""
    flush = find_schedule("1f1b").simulate(1, 1, pipeline(2, latency_s=DELAY))
    assert flush.makespan_s == 2 * (30 + 60) + 2 * DELAY + 5 * 2 * DELAY


def test_latency_and_bandwidth_are_those_of_each_link() -> None:
    links = pipeline(3, latency_s=(1, 5), message_bytes=40, bandwidth_bytes_per_s=(20, 40))
    assert links.latencies_s == (1, 5) and links.links_s == (2, 1)
    plans = [parse_actions(text) for text in ("F0 SF0", "RF0 F0 SF0", "RF0 F0")]
    assert simulate(plans, links).makespan_s == 30 + (2 + 1) + 30 + (1 + 5) + 30
    with pytest.raises(ValueError, match="2 numbers for 1 links between 2 stages"):
        _ = pipeline(2, latency_s=(1, 5)).latencies_s


def test_no_slack_where_links_are_fast() -> None:
    assert cheapest_slack(4, pipeline(4), most=12) == (0, 0, 0)


def test_slack_is_where_the_slow_link_is_and_hides_it() -> None:
    slow = pipeline(4, latency_s=(0, DELAY, 0))
    slack = cheapest_slack(4, slow, most=12)
    assert slack == (0, 1, 0)
    assert paci_microbatches_per_s(4, slow, slack) == pytest.approx(1 / 90)
    assert paci_microbatches_per_s(4, slow, (0, 0, 0)) < 0.85 / 90


def test_longer_ways_take_more_and_no_more_than_there_is_room_for() -> None:
    far = pipeline(2, latency_s=200)
    enough = cheapest_slack(4, far, most=100)
    assert enough[0] > 2 and paci_microbatches_per_s(4, far, enough) > 0.98 / 90
    assert paci_microbatches_per_s(4, far, (enough[0] - 1,)) < 0.98 / 90
    for most in range(enough[0]):
        assert cheapest_slack(4, far, most=most) == (most,)


def test_jitter_takes_slack_too() -> None:
    uneven = pipeline(8, jitter=0.2)
    slack = cheapest_slack(8, uneven, most=8)
    assert 0 < sum(slack) <= 8
    assert paci_microbatches_per_s(8, uneven, slack) > 0.96 / 90 > paci_microbatches_per_s(8, uneven, (0,) * 7)


def test_among_many_links_slack_is_spread_over_all_that_want_it() -> None:
    far = pipeline(16, latency_s=DELAY)
    slack = cheapest_slack(16, far, most=32)
    assert slack == (1,) * 15 and paci_microbatches_per_s(16, far, slack) == pytest.approx(1 / 90)
    for most in (4, 9):
        fewer = cheapest_slack(16, far, most=most)
        assert sum(fewer) <= most and set(fewer) == {0, 1}


def test_where_gradients_are_received_when_due_slack_does_not_hide_the_handshake() -> None:
    slow = pipeline(2, latency_s=DELAY)
    assert cheapest_slack(4, slow, most=4, gradients_ahead=False) == (0,)
    assert paci_microbatches_per_s(4, slow, (4,), gradients_ahead=False) < 0.75 / 90


def test_times_of_a_stages_actions_are_their_median_and_how_far_they_spread() -> None:
    even = [1 + 0.2 * (n / 50 - 1) for n in range(101)]  # between 0.8 and 1.2
    assert ActionTimes.of([50.0, *even]) == (pytest.approx(1, abs=0.01), pytest.approx(0.2, abs=0.01))
    assert ActionTimes.of([2.0] * 9) == (2, 0) and ActionTimes.of([3.0]) == (3, 0) and ActionTimes.of([]) == (0, 0)


def measured(stage: int, forward_s: float = 0.03, latency_s: float = 0.0, message_s: float = 0.0) -> Measured:
    return Measured(stage, ActionTimes(forward_s, 0.1), ActionTimes(0.06, 0.3), 0.001, LinkTimes(latency_s, message_s))


def test_of_several_replicas_the_slowest_stage_and_link_count() -> None:
    replicas = [measured(0, latency_s=0.02, message_s=0.5), measured(1), measured(0, forward_s=0.04), measured(1)]
    costs = costs_of(replicas)
    assert [(stage.forward_s, stage.backward_s, stage.update_s) for stage in costs.stages] == [
        (0.04, 0.06, 0.001),
        (0.03, 0.06, 0.001),
    ]
    assert (costs.latencies_s, costs.links_s, costs.jitter) == ((0.02,), (0.5,), pytest.approx(0.2))


def choices(saved: Any = None, iteration: int = 0, **extra: Any) -> SlackChoices:
    extra = {"choices": ((0, (0, 0)),), "most": 3, **extra}
    return SlackChoices(PaciConfig(3, extra=Extra(**extra)), iteration, saved)


def test_a_run_that_chooses_drains_once_and_a_resumed_one_keeps_what_it_has() -> None:
    plan = Plan("paci", 3, 2)
    first = choices(is_auto=True)
    assert first.drains(5, plan.record_lag) == [5 + 2 * 2 + 8]
    assert [first.is_due(iteration, plan) for iteration in (11, 12)] == [False, True]
    saved = [[0, [0, 0]], [12, [1, 2]], [30, [0, 1]]]
    resumed = choices(saved, iteration=20, is_auto=True)
    assert resumed.drains(20, plan.record_lag) == [12] and resumed.after(20) == (1, 2), "30 is yet to come"
    assert not resumed.is_due(31, plan) and resumed.is_due(32, plan)
    for other in ([[0, [0]], [12, [2]]], [[0, [0, 0]], [12, [3, 3]]]):  # of another pipeline, of a larger budget
        assert choices(other, iteration=20, is_auto=True).drains(20, plan.record_lag) == [32]


@pytest.mark.parametrize(("most_bytes", "more"), [(None, 3), (0.7e9, 0), (0.8e9, 1), (0.99e9, 1), (1.0e9, 2), (9e9, 3)])
def test_a_budget_of_bytes_holds_as_many_as_fit(most_bytes: int | None, more: int) -> None:
    """Beside the three that the first of three stages needs, of 200 MB each."""
    assert choices(is_auto=True, most_bytes=most_bytes)._most(3, 200e6) == more
    assert most_bytes is None or choices(is_auto=True, most_bytes=most_bytes)._most(3, 0.0) == 0, "not measured"


def test_a_run_that_is_done_again_drains_where_the_first_one_chose() -> None:
    again = choices(choices=((0, (0, 0)), (12, (1, 2)), (30, (0, 1))))
    assert again.drains(0, 2) == [12, 30] and not again.is_due(100, Plan("paci", 3, 2))
    assert [again.after(iteration) for iteration in (0, 11, 12, 29, 30)] == [(0, 0), (0, 0), (1, 2), (1, 2), (0, 1)]
    assert [again.begins_after(iteration) for iteration in (0, 12, 13)] == [False, True, False]
    line = choice_line(12, Plan("paci", 3, 2, again.after(12)), {})
    assert line.startswith(
        "in flight from iteration 13 on: 1,2 more by link, 6 micro-batches at the first stage, drift of at "
    )
