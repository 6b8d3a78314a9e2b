"""Processes of a V, each performing its plan over a network with NCCL's rules, train what its stages do in one process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from paci_megatron.runtime import groups, links
from paci_megatron.runtime.emulate import InProcessTransport
from paci_megatron.runtime.groups import ProcessTransport
from paci_megatron.runtime.turns import Turns, run_to_update
from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.vee import Fold, fold, forward_pass
from tests.support.fake_network import FakeNetwork
from tests.support.toy_pipeline import SHAPE, ToyStage

UPDATES, PLANS = 5, 2
CPU = torch.device("cpu")

Drains = Sequence[int]


def plan_of(folded: Fold, a: int, drains: Drains = (UPDATES,)) -> Plan:
    """Of 2N stages that each take their turns as they can."""
    return Plan("paci", folded.num_stages, a, folded.slack, drains.__contains__)


def in_one_process(plan: Plan, updates_of_plans: Sequence[int]) -> list[list[torch.Tensor]]:
    stages = [ToyStage(stage, plan.num_stages) for stage in range(plan.num_stages)]
    transport = InProcessTransport(plan.num_stages, True, lambda record: record)
    for updates in updates_of_plans:
        for stage in stages:
            stage.begin(plan, transport)
        for _ in range(updates):
            run_to_update(stages)
        for stage in stages:
            stage.end()
    return [stage.weights() for stage in stages]


class Process:
    """A process of the V: its two stages, and the transport of both. Groups are names here."""

    def __init__(self, process: int, folded: Fold) -> None:
        self._process, self._folded = process, folded
        self._stages = [ToyStage(folded.stage_of(process, chunk), folded.num_stages) for chunk in (0, 1)]

    def connect(self, lag: int) -> None:
        """To be called by the process's own thread."""
        process, folded = self._process, self._folded
        ranks = [folded.place(stage)[0] for stage in range(folded.num_stages)]
        tied = torch.zeros(1) if process == 0 else None
        self._transport = ProcessTransport(ranks, SHAPE, torch.float32, CPU, lag, over_nccl=True, tied=tied)

    def train(self, plan: Plan) -> None:
        """A plan to its drain, and before it micro-batches forward only."""
        self.evaluate(plan)
        for stage in self._stages:
            stage.begin(plan, self._transport)
        turns = Turns(plan.process_actions(self._process), self._stages)
        for update in range(1, UPDATES + 1):
            turns.run_to_update()
            assert [stage.executor.updates >= update for stage in self._stages] == [True, True]
        for stage in self._stages:
            stage.end()

    def evaluate(self, plan: Plan) -> None:
        """What the last stage gets is the output of all earlier ones."""
        links = [self._transport.link(stage.index, plan) for stage in self._stages]
        outputs: list[torch.Tensor] = []
        for action in forward_pass(self._process, self._folded, microbatches=5):
            stage, link = self._stages[action.chunk], links[action.chunk]
            match action.kind:
                case Kind.RECV_FORWARD:
                    link.post_receive_forward(action.index)
                case Kind.FORWARD:
                    received = link.receive_forward(action.index)
                    number = 100 * action.index if stage.index == 0 else int(received.flatten()[0]) + 1  # type: ignore[union-attr]
                    assert number == 100 * action.index + stage.index
                    outputs.append(torch.full(SHAPE, float(number)))
                case Kind.SEND_FORWARD:
                    link.send_forward(action.index, outputs[-1])
        for link in links:
            link.drain()

    def weights(self) -> list[list[torch.Tensor]]:
        return [stage.weights() for stage in self._stages]


def over_network(monkeypatch: pytest.MonkeyPatch, folded: Fold, plan: Plan, seed: int) -> list[list[torch.Tensor]]:
    network = FakeNetwork(seed)
    for module in (links, groups):
        monkeypatch.setattr(module, "dist", network)
    monkeypatch.setattr(groups, "create_groups", lambda wanted, make: [f"{one.name} {one.ranks}" for one in wanted])
    monkeypatch.setattr(groups, "use_once", lambda *arguments: None)
    processes = [Process(process, folded) for process in range(len(folded.begins))]
    errors: list[BaseException] = []

    def train(process: Process) -> None:
        try:
            process.connect(plan.record_lag)
            for _ in range(PLANS):
                process.train(plan)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=train, args=(process,), name=str(at), daemon=True) for at, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors
    weights = [process.weights() for process in processes]
    return [first for first, _ in weights] + [second for _, second in reversed(weights)]


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("num_processes", "a"), [(2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("wait", [0, 1])
def test_processes_of_a_v_train_what_its_stages_in_one_process_do(
    monkeypatch: pytest.MonkeyPatch, num_processes: int, a: int, wait: int
) -> None:
    folded = fold(num_processes, 1, 2, wait)
    expected = in_one_process(plan_of(folded, a), [UPDATES] * PLANS)
    assert all(torch.isfinite(weight).all() for stage in expected for weight in stage)
    for seed in range(2):
        plan = replace(plan_of(folded, a), schedule="paci-v", folded=folded)
        assert same(over_network(monkeypatch, folded, plan, seed), expected), f"seed {seed}"


def test_with_a_drain_at_every_update_a_v_trains_what_a_flush_does() -> None:
    folded = fold(2)
    drained = in_one_process(plan_of(folded, 3, range(1, UPDATES + 1)), [UPDATES])
    flushed = in_one_process(Plan("1f1b", folded.num_stages, 3), [UPDATES])
    assert same(drained, flushed)
    assert not same(in_one_process(plan_of(folded, 3), [UPDATES]), flushed)
