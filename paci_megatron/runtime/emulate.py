"""N stages in one process: links that hand tensors over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan

from .control import Record
from .link_times import LinkTimes


class InProcessLink:
    """A stage's end of the transfers to neighbours in the same process; a :class:`~.links.StageLink`."""

    def __init__(self) -> None:
        self._previous: InProcessLink | None = None
        self._following: InProcessLink | None = None
        self._activations: deque[tuple[int, torch.Tensor]] = deque()
        self._gradients: deque[tuple[int, torch.Tensor]] = deque()
        self._reports: deque[Record] = deque()
        self._totals: deque[Record] = deque()

    def has_input(self, action: Action) -> bool:
        """Whether the neighbour has sent what ``action`` needs."""
        if action.kind is Kind.FORWARD:
            return self._previous is None or bool(self._activations)
        if action.kind is Kind.BACKWARD:
            return self._following is None or bool(self._gradients)
        if action.kind is Kind.REPORT:
            return self._following is None or bool(self._reports)
        if action.kind is Kind.TOTAL:
            return self._previous is None or bool(self._totals)
        return True

    def post_receive_forward(self, microbatch: int) -> None:
        """Nothing to get ready."""

    def receive_forward(self, microbatch: int) -> torch.Tensor | None:
        """The activation sent earliest; None on the first stage."""
        return None if self._previous is None else _take(self._activations, microbatch)

    def send_forward(self, microbatch: int, activation: torch.Tensor) -> None:
        """Hand ``activation`` to the next stage, as a leaf of its own graph."""
        assert self._following is not None
        self._following._activations.append((microbatch, activation.detach().requires_grad_()))

    def post_receive_backward(self, microbatch: int) -> None:
        """Nothing to get ready."""

    def receive_backward(self, microbatch: int) -> torch.Tensor | None:
        """The gradient sent earliest; None on the last stage."""
        return None if self._following is None else _take(self._gradients, microbatch)

    def send_backward(self, microbatch: int, gradient: torch.Tensor) -> None:
        """Hand ``gradient`` to the previous stage."""
        assert self._previous is not None
        self._previous._gradients.append((microbatch, gradient.detach()))

    def post_receive_report(self) -> None:
        """Nothing to get ready."""

    def receive_report(self) -> Record:
        """The next stage's report; an empty one on the last stage."""
        return Record() if self._following is None else self._reports.popleft()

    def send_report(self, record: Record) -> None:
        """Hand a report to the previous stage, if there is one."""
        if self._previous is not None:
            self._previous._reports.append(record)

    def post_receive_total(self) -> None:
        """Nothing to get ready."""

    def receive_total(self) -> Record | None:
        """The total from the previous stage; None on the first."""
        return None if self._previous is None else self._totals.popleft()

    def send_total(self, record: Record) -> None:
        """Hand a total to the next stage, if there is one."""
        if self._following is not None:
            self._following._totals.append(record)

    def drain(self) -> None:
        """``RuntimeError`` if something was sent here and never used."""
        left = [microbatch for queue in (self._activations, self._gradients) for microbatch, _ in queue]
        if left or self._reports or self._totals:
            raise RuntimeError(f"micro-batches {left} under way at a drain: a bug in the plan")


def _take(queue: deque[tuple[int, torch.Tensor]], microbatch: int) -> torch.Tensor:
    sent, tensor = queue.popleft()
    if sent != microbatch:
        raise RuntimeError(f"micro-batch {microbatch} awaited, {sent} was sent: a bug in the plan")
    return tensor


class HandOver:
    """Both ends of a direction between two stages of this process, of which the first sends before the second receives."""

    def __init__(self) -> None:
        self._sent: deque[Any] = deque()

    def send(self, sent: Any) -> None:
        """See :class:`~.links.Outgoing`."""
        self._sent.append(sent)

    def post(self) -> None:
        """Nothing to get ready."""

    def receive(self) -> Any:
        """What was sent earliest."""
        return self._sent.popleft()

    def drain(self) -> None:
        """``RuntimeError`` if something was sent and never used."""
        if self._sent:
            raise RuntimeError(f"{len(self._sent)} under way between two stages at a drain: a bug in the plan")


class LocalRecords(NamedTuple):
    """Records to and from another stage of this process."""

    outgoing: HandOver
    incoming: HandOver

    def post(self) -> None:
        """Nothing to get ready."""

    def receive(self) -> Record:
        """The other stage's next record."""
        record: Record = self.incoming.receive()
        return record

    def send(self, record: Record) -> None:
        """Hand a record over."""
        self.outgoing.send(record)

    def drain(self) -> None:
        """``RuntimeError`` if a record was not read."""
        self.incoming.drain()


class InProcessExchange:
    """One end of a :class:`~.tied_embeddings.TensorExchange` between two stages of a process."""

    def __init__(self) -> None:
        self._other = self
        self._received: deque[torch.Tensor] = deque()

    @classmethod
    def pair(cls) -> tuple[InProcessExchange, InProcessExchange]:
        """The two ends."""
        one, other = cls(), cls()
        one._other, other._other = other, one
        return one, other

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        self._other._received.append(tensor.clone())

    def receive(self) -> torch.Tensor:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        return self._received.popleft()

    def drain(self) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        if self._received:
            raise RuntimeError(f"{len(self._received)} tied gradients not taken at a drain: a bug in the plan")


def in_process_links(num_stages: int) -> list[InProcessLink]:
    """The links of a pipeline in one process, first stage to last."""
    links = [InProcessLink() for _ in range(num_stages)]
    for before, after in pairwise(links):
        before._following, after._previous = after, before
    return links


class InProcessTransport:
    """A :class:`~.links.Transport` of stages that are all in this process."""

    receives_hold_device = False

    def __init__(self, num_stages: int, ties_embeddings: bool, agree: Callable[[Record], Record]) -> None:
        """``agree`` makes one record of those of several such processes, replicas of the pipeline."""
        self._links = in_process_links(num_stages)
        ends = (0, num_stages - 1) if ties_embeddings else ()
        self._exchanges = dict(zip(ends, InProcessExchange.pair(), strict=False))
        self.agree = agree

    def link(self, stage_index: int, plan: Plan) -> InProcessLink:
        """See :class:`~.links.Transport`."""
        return self._links[stage_index]

    def tied_exchange(self, stage_index: int, record_lag: int) -> InProcessExchange | None:
        """See :class:`~.links.Transport`."""
        return self._exchanges.get(stage_index)

    def rank_of(self, stage_index: int) -> int:
        """See :class:`~.links.Transport`."""
        return 0

    def link_times(self) -> dict[int, LinkTimes]:
        """See :class:`~.links.Transport`: no time at all."""
        return {}
