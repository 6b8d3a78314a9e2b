"""Transfers between a stage and its neighbours."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan

from .control import Record
from .device import HostCopy, host_buffer
from .hand_over import LocalRecords
from .link_times import LinkTimes
from .tied_embeddings import TensorExchange


class Transport(Protocol):
    """How the stages of this process reach their neighbours, in this process or in others.

    What :meth:`link` and :meth:`tied_exchange` return serves one plan; ``record_lag`` is its own.
    """

    receives_hold_device: bool
    """Whether a pending receive is a kernel on the device, as over NCCL: gradients' receives are then not posted ahead."""

    def link(self, stage_index: int, plan: Plan) -> StageLink:
        """The transfers and records of a stage of this process."""

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorExchange | None:
        """The exchange of the tied embedding's gradients; None at a stage that has no part in it."""

    def agree(self, record: Record) -> Record:
        """One record of those that the ranks of the first stage have for one update."""

    def rank_of(self, stage_index: int) -> int:
        """The rank of a stage's process in this pipeline."""

    def link_times(self) -> dict[int, LinkTimes]:
        """Of the links that begin at a stage of this process. Collective over the pipeline, while it is empty."""


class Outgoing(Protocol):
    """One direction to one other rank, where this rank sends."""

    def send(self, tensor: torch.Tensor) -> None:
        """Send ``tensor``, which the caller may empty but not change; returns without waiting for the other rank."""

    def drain(self) -> None:
        """Wait until everything sent has been received."""


class Incoming(Protocol):
    """One direction from one other rank, where this rank receives tensors of one shape."""

    def post(self) -> None:
        """Get ready for one more tensor; returns at once."""

    def has_arrived(self) -> bool:
        """Whether :meth:`receive` can return, if need be by waiting; False only if waiting would be for ever."""

    def receive(self) -> torch.Tensor:
        """Wait for the tensor posted earliest and not yet received."""

    def drain(self) -> None:
        """``RuntimeError`` if a receive is still posted."""


class _Sends:
    """Sends on a group, each tensor held until its send is done."""

    def __init__(self, group: dist.ProcessGroup, hold: int, tag: int = 0) -> None:
        """By the order of the plan a send is done when ``hold`` more have been made: waiting for it costs nothing."""
        self._group = group
        self._hold = hold
        self._tag = tag
        self._sent: deque[tuple[torch.Tensor, Any]] = deque()

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        while len(self._sent) >= self._hold:
            # Over NCCL it is the current stream that waits, not the host. torch records the tensor on NCCL's stream too, so
            # its memory comes back when that stream has come past the last send queued so far: one or two sends later.
            self._take_oldest()
        self._sent.append((tensor, dist.isend(tensor, dst=destination, group=self._group, tag=self._tag)))

    def drain(self) -> None:
        while self._sent:
            self._take_oldest()

    def _take_oldest(self) -> None:
        self._sent[0][1].wait()
        self._sent.popleft()  # which lets go of the tensor, and not before


class DirectOutgoing:
    """Sends tensors as they are, over the group's own backend: NCCL from a GPU, gloo from a CPU."""

    def __init__(self, group: dist.ProcessGroup, peer: int, hold: int) -> None:
        """``peer`` is the receiver's rank in the world; for ``hold`` see :class:`_Sends`."""
        self._sends = _Sends(group, hold)
        self._peer = peer

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`Outgoing`."""
        self._sends.send(tensor.contiguous(), self._peer)

    def drain(self) -> None:
        """See :class:`Outgoing`."""
        self._sends.drain()


class DirectIncoming:
    """Receives tensors over the group's own backend, into a ring of buffers that stay.

    torch records a received tensor on NCCL's stream, behind whatever is queued there: the receive that is posted ahead too.
    If buffers were freed and made anew, their memory would come back that much later. A ring needs no such care: posting a
    receive orders it behind all that the current stream has been given, and with it behind the last use of its buffer.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        peer: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        ring: int,
    ) -> None:
        """``peer`` is the sender's rank in the world. ``ring`` is the most tensors that are posted or still in use."""
        self._group = group
        self._peer = peer
        self._shape, self._dtype, self._device = shape, dtype, device
        self._ring: deque[torch.Tensor] = deque(maxlen=ring)
        self._posted: deque[tuple[torch.Tensor, Any]] = deque()

    def post(self) -> None:
        """See :class:`Incoming`."""
        buffer = self._buffer()
        self._posted.append((buffer, dist.irecv(buffer, src=self._peer, group=self._group)))

    def has_arrived(self) -> bool:
        """See :class:`Incoming`."""
        return True

    def receive(self) -> torch.Tensor:
        """See :class:`Incoming`. The tensor may be used until ``ring`` more have been posted."""
        buffer, work = self._posted.popleft()
        work.wait()
        return buffer.detach()  # a tensor of its own each time, over the same memory

    def drain(self) -> None:
        """See :class:`Incoming`."""
        if self._posted:
            raise RuntimeError(f"{len(self._posted)} receives posted across a drain: a bug in the plan")

    def _buffer(self) -> torch.Tensor:
        """The buffer used longest ago, or one more while the ring is not full."""
        if len(self._ring) == self._ring.maxlen:
            self._ring.rotate(-1)
        else:
            self._ring.append(torch.empty(self._shape, dtype=self._dtype, device=self._device))
        return self._ring[-1]


class HostOutgoing(DirectOutgoing):
    """Sends through the host's memory over gloo: for ranks that share a GPU, which NCCL refuses.

    Meant for tests. The host waits until the device has computed and copied the tensor.
    """

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`Outgoing`."""
        copy = HostCopy(tensor.contiguous())
        self._sends.send(copy.wait(), self._peer)


class HostIncoming(DirectIncoming):
    """Receives through the host's memory over gloo, see :class:`HostOutgoing`."""

    def receive(self) -> torch.Tensor:
        """See :class:`Incoming`."""
        # The allocator keeps a pinned buffer from reuse until a copy out of it that is under way is done: no ring here.
        return super().receive().to(self._device, non_blocking=True)

    def _buffer(self) -> torch.Tensor:
        return host_buffer(self._shape, self._dtype, for_device=self._device)


class TensorPair:
    """The :class:`~.tied_embeddings.TensorExchange` of two ranks: several groups for each direction, used in turn.

    A receive is posted updates before the other side sends. With CUDA_DEVICE_MAX_CONNECTIONS=1 a second one on the same
    communicator would wait for it at the head of the device's only queue, and hold up all that is queued behind.
    """

    def __init__(self, to_other: Sequence[Outgoing], from_other: Sequence[Incoming]) -> None:
        self._to_other, self._from_other = to_other, from_other
        self._sent = self._received = 0

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        self._to_other[self._sent % len(self._to_other)].send(tensor)
        self._from_other[self._sent % len(self._from_other)].post()
        self._sent += 1

    def receive(self) -> torch.Tensor:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        self._received += 1
        return self._from_other[(self._received - 1) % len(self._from_other)].receive()

    def drain(self) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        for outgoing, incoming in zip(self._to_other, self._from_other, strict=True):
            outgoing.drain()
            incoming.drain()


class _Posted:
    """An :class:`Incoming` whose tensors are known by micro-batch, and are leaves of their own graphs."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming
        self._microbatches: deque[int] = deque()

    def post(self, microbatch: int) -> None:
        self._microbatches.append(microbatch)
        self._incoming.post()

    def receive(self, microbatch: int) -> torch.Tensor:
        posted = self._microbatches.popleft()
        if posted != microbatch:
            raise RuntimeError(f"micro-batch {microbatch} awaited, {posted} was posted: a bug in the plan")
        return self._incoming.receive().requires_grad_()

    def drain(self) -> None:
        self._incoming.drain()


class RemoteRecords:
    """Records to and from a stage in another process, over a gloo group."""

    def __init__(self, group: dist.ProcessGroup, peer: int, tag: int, hold: int) -> None:
        """``peer`` is the other's rank in the world. The same pair of ranks may have more such, of other tags. For ``hold``
        see :class:`_Sends`.
        """
        self._group, self._peer, self._tag = group, peer, tag
        self._sends = _Sends(group, hold, tag)
        self._posted: deque[tuple[torch.Tensor, Any]] = deque()

    def post(self) -> None:
        """Get ready for one more record; returns at once."""
        # Ahead of its use: gloo sends only when it knows of the receive, and over a slow link that takes time.
        tensor = torch.empty(len(Record._fields), dtype=torch.float64)
        self._posted.append((tensor, dist.irecv(tensor, src=self._peer, group=self._group, tag=self._tag)))

    def has_arrived(self) -> bool:
        """See :class:`Incoming`."""
        return True

    def receive(self) -> Record:
        """Wait for the record posted earliest."""
        tensor, work = self._posted.popleft()
        work.wait()
        return Record(*tensor.tolist())

    def send(self, record: Record) -> None:
        """Send a record; returns at once."""
        self._sends.send(torch.tensor(record, dtype=torch.float64), self._peer)

    def drain(self) -> None:
        """Wait until everything sent has been received."""
        self._sends.drain()


@dataclass(frozen=True)
class Neighbour:
    """The stage before or after: a direction each way, activations one way and gradients the other, and its records."""

    outgoing: Outgoing
    incoming: Incoming
    records: RemoteRecords | LocalRecords


class StageLink:
    """A stage's transfers, and its records. Activations and gradients are (sequence, micro-batch size, hidden).

    Each direction to a stage in another process has a process group of its own, receives are posted ahead and sends not
    waited for. So no transfer queues behind one of another pair or direction: see
    docs/how-it-works.md, Transfers.
    """

    def __init__(self, previous: Neighbour | None, following: Neighbour | None) -> None:
        """``previous`` is None on the first stage, ``following`` on the last."""
        self._previous, self._following = previous, following
        self._activations = _Posted(previous.incoming) if previous is not None else None
        self._gradients = _Posted(following.incoming) if following is not None else None

    def has_input(self, action: Action) -> bool:
        """Whether ``action`` can be performed now, if need be by waiting; False only if waiting would be for ever."""
        before, after = self._previous, self._following
        match action.kind:
            case Kind.FORWARD:
                return before is None or before.incoming.has_arrived()
            case Kind.BACKWARD:
                return after is None or after.incoming.has_arrived()
            case Kind.REPORT:
                return after is None or after.records.has_arrived()
            case Kind.TOTAL:
                return before is None or before.records.has_arrived()
        return True

    def post_receive_forward(self, microbatch: int) -> None:
        """Get ready for an activation from the previous stage; returns at once."""
        assert self._activations is not None
        self._activations.post(microbatch)

    def receive_forward(self, microbatch: int) -> torch.Tensor | None:
        """Wait for the activation posted earliest; None on the first stage."""
        return None if self._activations is None else self._activations.receive(microbatch)

    def send_forward(self, microbatch: int, activation: torch.Tensor) -> None:
        """Send an activation to the next stage; returns at once."""
        assert self._following is not None
        # An alias: the schedule may empty the tensor itself (deallocate_pipeline_outputs) while it is under way.
        self._following.outgoing.send(activation.detach())

    def post_receive_backward(self, microbatch: int) -> None:
        """Get ready for a gradient from the next stage; returns at once."""
        assert self._gradients is not None
        self._gradients.post(microbatch)

    def receive_backward(self, microbatch: int) -> torch.Tensor | None:
        """Wait for the gradient posted earliest; None on the last stage."""
        return None if self._gradients is None else self._gradients.receive(microbatch)

    def send_backward(self, microbatch: int, gradient: torch.Tensor) -> None:
        """Send a gradient to the previous stage; returns at once."""
        assert self._previous is not None
        self._previous.outgoing.send(gradient.detach())

    def post_receive_report(self) -> None:
        """Get ready for one more report; returns at once."""
        if self._following is not None:
            self._following.records.post()

    def receive_report(self) -> Record:
        """The next stage's report; an empty one on the last stage."""
        return Record() if self._following is None else self._following.records.receive()

    def send_report(self, record: Record) -> None:
        """To the previous stage; nothing on the first."""
        if self._previous is not None:
            self._previous.records.send(record)

    def post_receive_total(self) -> None:
        """Get ready for one more total; returns at once."""
        if self._previous is not None:
            self._previous.records.post()

    def receive_total(self) -> Record | None:
        """The total from the previous stage; None on the first."""
        return None if self._previous is None else self._previous.records.receive()

    def send_total(self, record: Record) -> None:
        """To the next stage; nothing on the last."""
        if self._following is not None:
            self._following.records.send(record)

    def drain(self) -> None:
        """Wait until everything sent has been received; ``RuntimeError`` if a receive is still posted."""
        for posted in (self._activations, self._gradients):
            if posted is not None:
                posted.drain()
        for neighbour in (self._previous, self._following):
            if neighbour is not None:
                neighbour.outgoing.drain()
                neighbour.records.drain()
