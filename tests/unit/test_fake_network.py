"""Stages over a network with NCCL's rules, late and in any rhythm, train what stages in one process do, bit for bit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paci_megatron.runtime import links
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.emulate import InProcessTransport
from paci_megatron.runtime.link_times import LinkTimes
from paci_megatron.runtime.links import DirectIncoming, DirectOutgoing, Neighbour, RemoteRecords, StageLink, TensorPair
from paci_megatron.runtime.turns import run_to_update
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import even_slack, lead_of_previous, sends_in_flight
from tests.support.fake_network import FakeNetwork
from tests.support.toy_pipeline import SHAPE, VOCABULARY, WIDTH, ToyStage

NUM_STAGES, UPDATES, PLANS = 4, 5, 2
CPU = torch.device("cpu")

Incoming = Callable[..., DirectIncoming]


class Network:
    """The transport of one stage, as runtime/groups.py makes it over NCCL; groups are names here."""

    receives_hold_device = True

    def __init__(self, stage: int, incoming: Incoming) -> None:
        self._stage, self._incoming = stage, incoming

    def link(self, stage_index: int, plan: Plan) -> StageLink:
        here = self._stage
        held = plan.max_in_flight(here) + lead_of_previous(here, plan.slack)
        records: Any = "records"

        def neighbour(there: int, ring: int) -> Neighbour | None:
            if not 0 <= there < NUM_STAGES:
                return None
            hold = sends_in_flight(min(here, there), plan.slack)
            out: Any = f"{here} to {there}"
            told = RemoteRecords(records, there, tag=0, hold=plan.record_lag + 1)
            return Neighbour(DirectOutgoing(out, there, hold), self._receives(there, ring, SHAPE), told)

        return StageLink(neighbour(here - 1, held), neighbour(here + 1, 1))

    def link_times(self) -> dict[int, LinkTimes]:
        return {}

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorPair | None:
        here, other = self._stage, NUM_STAGES - 1 - self._stage
        if here not in (0, NUM_STAGES - 1):
            return None
        turns = range(record_lag)
        groups: list[Any] = [f"tied {here} to {other}, {turn}" for turn in turns]
        shape = (VOCABULARY, WIDTH)
        return TensorPair(
            [DirectOutgoing(group, other, hold=2) for group in groups],
            [self._receives(other, 2, shape, f"tied {other} to {here}, {turn}") for turn in turns],
        )

    def agree(self, record: Record) -> Record:
        return record

    def rank_of(self, stage_index: int) -> int:
        return stage_index

    def _receives(self, there: int, ring: int, shape: tuple[int, ...], group: str | None = None) -> DirectIncoming:
        name: Any = group or f"{there} to {self._stage}"
        return self._incoming(name, there, shape, torch.float32, CPU, ring)


def plan_of(a: int, slack: tuple[int, ...]) -> Plan:
    return Plan("paci", NUM_STAGES, a, slack, lambda update: update == UPDATES)


def in_one_process(a: int, slack: tuple[int, ...]) -> list[list[torch.Tensor]]:
    stages = [ToyStage(stage, NUM_STAGES) for stage in range(NUM_STAGES)]
    transport = InProcessTransport(NUM_STAGES, True, lambda record: record)
    for _ in range(PLANS):
        for stage in stages:
            stage.begin(plan_of(a, slack), transport)
        for _ in range(UPDATES):
            run_to_update(stages)
        for stage in stages:
            stage.end()
    return [stage.weights() for stage in stages]


def over_network(
    monkeypatch: pytest.MonkeyPatch, a: int, slack: tuple[int, ...], seed: int, incoming: Incoming = DirectIncoming
) -> list[list[torch.Tensor]]:
    monkeypatch.setattr(links, "dist", FakeNetwork(seed))
    stages = [ToyStage(stage, NUM_STAGES) for stage in range(NUM_STAGES)]
    errors: list[BaseException] = []

    def train(stage: ToyStage) -> None:
        try:
            for _ in range(PLANS):
                stage.begin(plan_of(a, slack), Network(stage.index, incoming))
                for _ in range(UPDATES):
                    stage.executor.run_to_update()
                stage.end()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(stage,), name=str(stage.index), daemon=True) for stage in stages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    return [stage.weights() for stage in stages]


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))


EVEN = [(a, even_slack(NUM_STAGES, extra)) for a, extra in ((1, 0), (3, 0), (4, 0), (2, 3), (1, 6))]


@pytest.mark.parametrize(("a", "slack"), [*EVEN, (2, (0, 3, 1)), (1, (2, 0, 0))])
def test_training_over_the_network_is_training_in_one_process(
    monkeypatch: pytest.MonkeyPatch, a: int, slack: tuple[int, ...]
) -> None:
    expected = in_one_process(a, slack)
    assert all(torch.isfinite(weight).all() for stage in expected for weight in stage)
    for seed in range(3):
        assert same(over_network(monkeypatch, a, slack, seed), expected), f"seed {seed}"


class ReadsBeforeWaiting(DirectIncoming):
    """A link that takes a buffer before its data is there."""

    def receive(self) -> torch.Tensor:
        buffer, work = self._posted.popleft()
        early = buffer.detach().clone()
        work.wait()
        return early


class OneBufferTooFew(DirectIncoming):
    """A link that uses a buffer again while it is in use."""

    def __init__(
        self, group: Any, peer: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, ring: int
    ) -> None:
        super().__init__(group, peer, shape, dtype, device, ring=max(ring - 1, 1))


def test_a_link_that_does_not_hold_what_it_sends_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(self: Any, tensor: torch.Tensor, destination: int) -> None:
        self._sent.append((None, links.dist.isend(tensor, dst=destination, group=self._group, tag=self._tag)))

    expected = in_one_process(3, ())
    monkeypatch.setattr(links._Sends, "send", send)
    assert not same(over_network(monkeypatch, 3, (), 1), expected)


@pytest.mark.parametrize("wrong", [ReadsBeforeWaiting, OneBufferTooFew])
def test_a_link_that_breaks_the_rules_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: Incoming) -> None:
    assert not same(over_network(monkeypatch, 3, (), 1, wrong), in_one_process(3, ()))
