"""Transfers between stages: groups by pair and direction, and the way through the host's memory."""

from __future__ import annotations

import pytest

from paci_megatron.schedule.schedules import even_slack, lead_of_previous, max_in_flight
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated
from tests.support.link_jobs import EXTRA, UPDATES, A, LinkResult


@pytest.mark.parametrize(("num_stages", "link"), [(2, "p2p"), (4, "p2p"), (4, "host")])
def test_each_direction_of_each_pair_has_a_group_of_its_own(pool: GetPool, num_stages: int, link: str) -> None:
    results: list[LinkResult] = pool(num_stages).run("exchange_by_plan", link=link)
    assert [result.wrong for result in results] == [[]] * num_stages
    both_ways = 2 * 2 * UPDATES * A  # two plans; the stages at the ends have one neighbour, and the tied exchange
    assert [r.received for r in results] == [both_ways // 2 + 3, *[both_ways] * (num_stages - 2), both_ways // 2 + 3]
    # All ranks make all groups, in the same order.
    assert all(result.created == results[0].created for result in results)
    pairs = [(stage, stage + 1) for stage in range(num_stages - 1)]
    for name in ("PACI_ACTIVATIONS", "PACI_GRADIENTS"):
        assert [ranks for group, ranks in results[0].created if group == name] == pairs
    # Who sends on a group never receives on it, and both of its ranks use it.
    for rank, result in enumerate(results):
        for name, ranks, way in result.uses:
            down = name.startswith(("PACI_ACTIVATIONS", "PACI_TIED_FROM_FIRST"))
            if name != "PACI_RECORDS":
                assert way == ("send" if (rank == ranks[0]) == down else "receive"), (rank, name, ranks)


@pytest.mark.parametrize("num_stages", [4])
def test_received_tensors_lie_in_rings_of_buffers_that_stay(pool: GetPool, num_stages: int) -> None:
    results: list[LinkResult] = pool(num_stages).run("exchange_by_plan", link="p2p")
    for stage, result in enumerate(results):
        slack = even_slack(num_stages, EXTRA)
        held = max_in_flight(stage, num_stages, slack) + lead_of_previous(stage, slack)
        last = stage == num_stages - 1
        ring = 0 if last else 1 + lead_of_previous(stage + 1, slack)  # over gloo they are posted ahead
        for plan in (slice(0, UPDATES * A), slice(UPDATES * A, None)):
            activations, gradients = (result.addresses.get(kind, [])[plan] for kind in ("F", "B"))
            assert activations == (activations[:held] * UPDATES * A)[: UPDATES * A] if stage > 0 else not activations
            assert len(set(activations)) == (held if stage > 0 else 0)
            assert len(set(gradients)) == ring
        for kind, buffers in (("F", held), ("B", ring)):
            assert len(set(result.addresses.get(kind, []))) in (0, buffers), "the second plan has those of the first"


@pytest.mark.parametrize("num_stages", [2, 4])
def test_through_the_host_training_is_the_same_bit_for_bit(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int
) -> None:
    argv = arguments(corpus, num_stages, 3, "--clip-grad", "0.5")
    argv.remove("--untie-embeddings-and-output-weights")
    direct = pool(num_stages).run("train", argv=[*argv, *PACI])
    through_host = pool(num_stages).run("train", argv=[*argv, *PACI, "--paci-link", "host"])
    assert_same_bits(direct, through_host)
    assert_same_run(through_host, one_process(emulated([*argv, *PACI])))


def test_through_the_host_megatrons_own_schedule_is_the_same_bit_for_bit(pool: GetPool, corpus: str) -> None:
    argv = arguments(corpus, 4, 3)
    direct = pool(4).run("train", argv=argv)
    assert len(direct[-1].evaluations) == 2
    assert_same_bits(direct, pool(4).run("train", argv=[*argv, "--paci-link", "host"]))
