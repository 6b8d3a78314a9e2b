"""Slow links in the simulator, and the cheapest slack that hides them."""

from __future__ import annotations

import pytest

from paci_megatron.schedule import parse_actions
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
