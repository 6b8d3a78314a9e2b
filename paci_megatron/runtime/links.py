"""Transfers between a stage and its neighbours."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from paci_megatron.plan import Action

from .control import Record, RecordLink


class StageLink(RecordLink, Protocol):
    """A stage's transfers, and its records. Activations and gradients are (sequence, micro-batch size, hidden)."""

    def has_input(self, action: Action) -> bool:
        """Whether ``action`` can be performed now, if need be by waiting; False only if waiting would be for ever."""

    def post_receive_forward(self, microbatch: int) -> None:
        """Get ready for an activation from the previous stage; returns at once."""

    def receive_forward(self, microbatch: int) -> torch.Tensor | None:
        """Wait for the activation posted earliest; None on the first stage."""

    def send_forward(self, microbatch: int, activation: torch.Tensor) -> None:
        """Send an activation to the next stage; returns at once."""

    def post_receive_backward(self, microbatch: int) -> None:
        """Get ready for a gradient from the next stage; returns at once."""

    def receive_backward(self, microbatch: int) -> torch.Tensor | None:
        """Wait for the gradient posted earliest; None on the last stage."""

    def send_backward(self, microbatch: int, gradient: torch.Tensor) -> None:
        """Send a gradient to the previous stage; returns at once."""

    def drain(self) -> None:
        """Wait until everything sent has been received; ``RuntimeError`` if a receive is still posted."""


class _Sends:
    """Sends on a group, each tensor held until its send is done."""

    def __init__(self, group: dist.ProcessGroup, hold: int) -> None:
        """By the order of the plan a send is done when ``hold`` more have been made: waiting for it costs nothing."""
        self._group = group
        self._hold = hold
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        while len(self._sent) >= self._hold:
            self._sent.popleft()[1].wait()
        self._sent.append((tensor, dist.isend(tensor, dst=destination, group=self._group)))

    def drain(self) -> None:
        while self._sent:
            self._sent.popleft()[1].wait()


class TensorPair:
    """The :class:`~.tied_embeddings.TensorExchange` of two ranks, each direction on a process group of its own."""

    def __init__(
        self, to_other: dist.ProcessGroup, from_other: dist.ProcessGroup, other: int, like: torch.Tensor, hold: int
    ) -> None:
        """``like`` has the shape, type and device of every tensor; for ``hold`` see :class:`_Sends`."""
        self._sends = _Sends(to_other, hold)
        self._from_other, self._other = from_other, other
        self._like = like
        self._posted: deque[tuple[torch.Tensor, Any]] = deque()

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        self._sends.send(tensor, self._other)
        buffer = torch.empty_like(self._like)
        self._posted.append((buffer, dist.irecv(buffer, src=self._other, group=self._from_other)))

    def receive(self) -> torch.Tensor:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        buffer, work = self._posted.popleft()
        work.wait()
        return buffer


class _Channel:
    """One direction between neighbours: receives in posted order, sends held until they are done."""

    def __init__(self, communicator: P2PCommunicator, shape: tuple[int, ...], device: torch.device, hold: int) -> None:
        self._communicator = communicator
        self._group = communicator.pp_group
        self._shape = shape
        self._device = device
        self._posted: deque[tuple[int, torch.Tensor, Any]] = deque()
        self._sends = _Sends(self._group, hold)

    def post_receive(self, microbatch: int, source: int) -> None:
        dtype = self._communicator.config.pipeline_dtype
        buffer = torch.empty(self._shape, dtype=dtype, device=self._device, requires_grad=True)
        self._posted.append((microbatch, buffer, dist.irecv(buffer, src=source, group=self._group)))

    def receive(self, microbatch: int) -> torch.Tensor:
        posted, buffer, work = self._posted.popleft()
        if posted != microbatch:
            raise RuntimeError(f"micro-batch {microbatch} awaited, {posted} was posted: a bug in the plan")
        work.wait()
        return buffer

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        # An alias: the schedule may empty the tensor itself (deallocate_pipeline_outputs) while it is under way.
        self._sends.send(tensor.detach().contiguous(), destination)

    def drain(self) -> None:
        if self._posted:
            raise RuntimeError(f"receives of micro-batches {[p[0] for p in self._posted]} posted across a drain")
        self._sends.drain()


class _Records:
    """Records over a gloo group, in both directions."""

    def __init__(self, group: dist.ProcessGroup, hold: int) -> None:
        """For ``hold`` see :class:`_Sends`."""
        self._group = group
        self._sends = _Sends(group, hold)

    def receive(self, source: int) -> Record:
        tensor = torch.empty(len(Record._fields), dtype=torch.float64)
        dist.recv(tensor, src=source, group=self._group)
        return Record(*tensor.tolist())

    def send(self, record: Record, destination: int) -> None:
        self._sends.send(torch.tensor(record, dtype=torch.float64), destination)

    def drain(self) -> None:
        self._sends.drain()


class P2PLink:
    """Transfers over Megatron's :class:`P2PCommunicator`, activations and gradients on process groups of their own.

    Receives are posted ahead and sends not waited for, so the communicators supply ranks and groups, and the transfers
    are plain ``isend``/``irecv``. (Their own calls pair a send with a receive and wait for both, and use the world
    group for one direction when there are two stages.)
    """

    def __init__(
        self,
        activations: P2PCommunicator,
        gradients: P2PCommunicator,
        shape: tuple[int, ...],
        device: torch.device,
        records: dist.ProcessGroup,
        record_lag: int,
        sends_in_flight: int,
    ) -> None:
        """``shape`` is that of every transferred tensor: (sequence, micro-batch size, hidden). ``records`` is a gloo group
        of the same ranks, and ``record_lag`` after how many updates a total is everywhere.
        ``sends_in_flight`` in each direction are never waited for, see plan/schedules.py.
        """
        self._communicator = activations
        self._activations = _Channel(activations, shape, device, sends_in_flight)
        self._gradients = _Channel(gradients, shape, device, sends_in_flight)
        # Stage s-1 has read report k by the time s reports k + lag; totals are read sooner.
        self._reports, self._totals = (_Records(records, record_lag + 1) for _ in range(2))

    def has_input(self, action: Action) -> bool:
        """See :class:`StageLink`."""
        return True

    def post_receive_forward(self, microbatch: int) -> None:
        """See :class:`StageLink`."""
        self._activations.post_receive(microbatch, self._communicator.prev_rank)

    def receive_forward(self, microbatch: int) -> torch.Tensor | None:
        """See :class:`StageLink`."""
        return None if self._communicator.is_pp_first_stage else self._activations.receive(microbatch)

    def send_forward(self, microbatch: int, activation: torch.Tensor) -> None:
        """See :class:`StageLink`."""
        self._activations.send(activation, self._communicator.next_rank)

    def post_receive_backward(self, microbatch: int) -> None:
        """See :class:`StageLink`."""
        self._gradients.post_receive(microbatch, self._communicator.next_rank)

    def receive_backward(self, microbatch: int) -> torch.Tensor | None:
        """See :class:`StageLink`."""
        return None if self._communicator.is_pp_last_stage else self._gradients.receive(microbatch)

    def send_backward(self, microbatch: int, gradient: torch.Tensor) -> None:
        """See :class:`StageLink`."""
        self._gradients.send(gradient, self._communicator.prev_rank)

    def receive_report(self) -> Record:
        """See :class:`StageLink`."""
        if self._communicator.is_pp_last_stage:
            return Record()
        return self._reports.receive(self._communicator.next_rank)

    def send_report(self, record: Record) -> None:
        """See :class:`StageLink`."""
        if not self._communicator.is_pp_first_stage:
            self._reports.send(record, self._communicator.prev_rank)

    def receive_total(self) -> Record | None:
        """See :class:`StageLink`."""
        return None if self._communicator.is_pp_first_stage else self._totals.receive(self._communicator.prev_rank)

    def send_total(self, record: Record) -> None:
        """See :class:`StageLink`."""
        if not self._communicator.is_pp_last_stage:
            self._totals.send(record, self._communicator.next_rank)

    def drain(self) -> None:
        """See :class:`StageLink`."""
        for channel in (self._activations, self._gradients, self._reports, self._totals):
            channel.drain()
