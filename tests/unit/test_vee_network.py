"""Processes of a V, each performing its plan over a network with NCCL's rules, train what its stages do in one process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from paci_megatron.runtime import links
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.emulate import InProcessExchange, InProcessTransport, run_to_update
from paci_megatron.runtime.links import DirectIncoming, DirectOutgoing, Neighbour, P2PLink
from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import sends_in_flight
from paci_megatron.schedule.vee import Fold, fold, paci_v, with_messages
from tests.support.fake_network import FakeNetwork
from tests.support.toy_pipeline import SHAPE, ToyStage

UPDATES, PLANS = 5, 2
CPU = torch.device("cpu")

Drains = Sequence[int]


def plan_of(folded: Fold, a: int, drains: Drains = (UPDATES,)) -> Plan:
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


class Turn:
    """From one stage of a process to its other: a direction and its end, and the records beside it."""

    def __init__(self) -> None:
        self._tensors: deque[torch.Tensor] = deque()
        self.records: deque[Record] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        self._tensors.append(tensor.detach())

    def post(self) -> None:
        pass

    def receive(self) -> torch.Tensor:
        return self._tensors.popleft()

    def drain(self) -> None:
        assert not self._tensors and not self.records


class TurnLink(P2PLink):
    """The link of a stage of a V. Where the stage before or after is in this process, records pass by a :class:`Turn`."""

    def __init__(self, has_turn: Callable[[Action], bool], before: Turn | None, after: Turn | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._has_turn = has_turn
        self.from_before, self.from_after = before, after
        self.to_before: Turn | None = None
        self.to_after: Turn | None = None

    def has_input(self, action: Action) -> bool:
        return self._has_turn(action)

    def receive_report(self) -> Record:
        return super().receive_report() if self.from_after is None else self.from_after.records.popleft()

    def send_report(self, record: Record) -> None:
        if self.to_before is None:
            super().send_report(record)
        else:
            self.to_before.records.append(record)

    def receive_total(self) -> Record | None:
        return super().receive_total() if self.from_before is None else self.from_before.records.popleft()

    def send_total(self, record: Record) -> None:
        if self.to_after is None:
            super().send_total(record)
        else:
            self.to_after.records.append(record)


class Process:
    """A process of the V: two stages, which take turns as its plan says. Also the transport of both, for one plan."""

    receives_hold_device = True

    def __init__(self, process: int, folded: Fold) -> None:
        self._process, self._folded = process, folded
        self._stages = [ToyStage(folded.stage_of(process, chunk), folded.num_stages) for chunk in (0, 1)]
        self._tied = InProcessExchange.pair()
        self._next: Action | None = None

    def train(self, plan: Plan) -> None:
        """A plan to its drain."""
        self._up, self._down = Turn(), Turn()  # activations and totals; gradients and reports
        for chunk, stage in enumerate(self._stages):
            stage.begin(plan, self, self._of_chunk(plan, chunk))
        for action in self._actions(plan):
            self._next = action
            executor = self._stages[action.chunk].executor
            executor.run_to_update()
            assert executor.finished == Action(action.kind, action.index)
            if action == Action(Kind.UPDATE, UPDATES):
                break
        for stage in self._stages:
            stage.end()

    def weights(self) -> list[list[torch.Tensor]]:
        return [stage.weights() for stage in self._stages]

    def _actions(self, plan: Plan) -> Iterator[Action]:
        a, is_drain = plan.microbatches_per_update, plan.is_drain
        return with_messages(paci_v(self._process, self._folded, a, is_drain), self._process, self._folded, a, is_drain)

    def _of_chunk(self, plan: Plan, chunk: int) -> Iterator[Action]:
        return (Action(action.kind, action.index) for action in self._actions(plan) if action.chunk == chunk)

    def has_turn(self, stage_index: int, action: Action) -> bool:
        """Whether the process's plan has come to this action of the stage."""
        return self._next == Action(action.kind, action.index, int(stage_index != self._process))

    def link(self, stage_index: int, plan: Plan) -> P2PLink:
        turn = len(self._folded.begins) - 1  # the link between the two stages of the last process
        ends = [self._end(stage_index, link, plan) for link in (stage_index - 1, stage_index)]
        before, after = self._up if stage_index == turn + 1 else None, self._down if stage_index == turn else None
        records = f"records {int(stage_index > turn)}"
        link = TurnLink(partial(self.has_turn, stage_index), before, after, *ends, records, plan.record_lag)
        link.to_before = self._down if before is not None else None
        link.to_after = self._up if after is not None else None
        return link

    def _end(self, stage: int, link: int, plan: Plan) -> Neighbour | None:
        """This stage's end of the link between stages ``link`` and ``link + 1``."""
        there = link + 1 if stage == link else link
        if not 0 <= there < plan.num_stages:
            return None
        rank = min(there, plan.num_stages - 1 - there)
        if rank == self._process:
            return Neighbour(rank, *((self._up, self._down) if stage == link else (self._down, self._up)))
        names = [f"activations {link}", f"gradients {link}"]
        out, into = names if stage == link else reversed(names)
        ring = self._ring(plan, Kind.RECV_BACKWARD if stage == link else Kind.RECV_FORWARD, int(stage != self._process))
        outgoing: Any = DirectOutgoing(out, rank, sends_in_flight(link, plan.slack))  # type: ignore[arg-type]
        incoming: Any = DirectIncoming(into, rank, SHAPE, torch.float32, CPU, ring)  # type: ignore[arg-type]
        return Neighbour(rank, outgoing, incoming)

    def _ring(self, plan: Plan, kind: Kind, chunk: int) -> int:
        """The most that are posted and not yet through their backward."""
        held = most = 0
        for action in self._actions(plan):
            if action.chunk == chunk:
                held += (action.kind is kind) - (action.kind is Kind.BACKWARD)
                most = max(most, held)
            if action == Action(Kind.UPDATE, UPDATES):
                return most
        raise AssertionError("endless")

    def tied_exchange(self, stage_index: int, record_lag: int) -> InProcessExchange | None:
        if self._process:
            return None
        return self._tied[int(stage_index > 0)]

    def agree(self, record: Record) -> Record:
        return record

    def rank_of(self, stage_index: int) -> int:
        return min(stage_index, self._folded.num_stages - 1 - stage_index)


def over_network(monkeypatch: pytest.MonkeyPatch, folded: Fold, plan: Plan, seed: int) -> list[list[torch.Tensor]]:
    monkeypatch.setattr(links, "dist", FakeNetwork(seed))
    processes = [Process(process, folded) for process in range(len(folded.begins))]
    errors: list[BaseException] = []

    def train(process: Process) -> None:
        try:
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
        assert same(over_network(monkeypatch, folded, plan_of(folded, a), seed), expected), f"seed {seed}"


def test_with_a_drain_at_every_update_a_v_trains_what_a_flush_does() -> None:
    folded = fold(2)
    drained = in_one_process(plan_of(folded, 3, range(1, UPDATES + 1)), [UPDATES])
    flushed = in_one_process(Plan("1f1b", folded.num_stages, 3), [UPDATES])
    assert same(drained, flushed)
    assert not same(in_one_process(plan_of(folded, 3), [UPDATES]), flushed)
