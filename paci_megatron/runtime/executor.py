"""Performs a stage's plan, action by action, up to the next update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from paci_megatron.runtime.meters import StageMeter
from paci_megatron.schedule import Action, Kind

from .control import Record
from .links import StageLink
from .state import InFlight, PipelineState, UpdateResult
from .weight_drift import WeightDrift
from .weights import WeightVersions


class Compute(Protocol):
    """A stage's forwards and backwards. Megatron's are in :class:`.compute.StageCompute`."""

    def forward(self, microbatch: int, input_tensor: torch.Tensor | None) -> torch.Tensor:
        """The output for ``microbatch``, with its graph: an activation, or on the last stage the loss, a scalar.

        ``input_tensor`` is a leaf that wants a gradient; None on the first stage.
        """

    def release_output(self, output_tensor: torch.Tensor) -> None:
        """The output has been handed to the link: its data may be freed, its graph is still needed."""

    def backward(self, entry: InFlight, output_gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Accumulate ``entry``'s gradients; returns that of its input, None on the first stage.

        ``output_gradient`` is None on the last stage. The weights are those that the backward is to use, and may be newer
        than the forward's: they changed in place, unseen by autograd (:meth:`Update.apply`).
        """


class Update(Protocol):
    """A stage's optimizer steps. Megatron's are in :class:`.update.StageUpdate`. Updates count from 1 in each plan."""

    def report(self, update: int, later: Record) -> None:
        """The window's gradients are complete: send what is summed over the stages to the previous one.

        ``later`` is the report of the later stages. :meth:`.control.Control.report` adds and sends.
        """

    def pass_total(self, update: int) -> None:
        """Take the sum over all stages from the previous one and pass it on: :meth:`.control.Control.pass_total`."""

    def apply(self, update: int) -> UpdateResult:
        """Step the optimizer and clear the gradients. Micro-batches in flight have saved the weights for their backward:
        the step belongs inside ``torch.autograd._unsafe_preserve_version_counter(parameters)``.
        """

    def finish(self) -> None:
        """The plan ends at a drain."""


class Listener(Protocol):
    """Is told what the executor does, as it does it."""

    def begin(self, action: Action) -> None:
        """``action`` begins, with the wait for its input if it needs one."""

    def received(self) -> None:
        """The wait for the action's input is over. Told of FORWARD, BACKWARD and REPORT."""

    def end(self) -> None:
        """The action is done."""


class Cast(NamedTuple):
    """What tensors are sent in, and what stages compute in."""

    sent: torch.dtype
    computed: torch.dtype

    def to_send(self, tensor: torch.Tensor) -> torch.Tensor:
        """An output, or a gradient, as it is sent."""
        return tensor.detach().to(self.sent) if self.sent != self.computed else tensor

    def received(self, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """What was received, as a leaf to compute with; None where there is nothing."""
        if tensor is None or self.sent == self.computed:
            return tensor
        return tensor.detach().to(self.computed).requires_grad_()


class _Nobody:
    """Listens to nothing."""

    def begin(self, action: Action) -> None: ...

    def received(self) -> None: ...

    def end(self) -> None: ...


class Executor:
    """Does what the plan says, in its order, and decides nothing itself.

    Micro-batches still in flight when :meth:`run_to_update` returns stay in ``state`` for the next call.
    """

    def __init__(
        self,
        plan: Iterator[Action],
        compute: Compute,
        link: StageLink,
        update: Update,
        weights: WeightVersions,
        meter: StageMeter,
        listener: Listener | None = None,
        weight_drift: WeightDrift | None = None,
        cast: Cast = Cast(torch.float32, torch.float32),  # noqa: B008 - immutable; no cast
    ) -> None:
        """``weight_drift``, if given, follows the weights that micro-batches meet."""
        self._cast = cast
        self.state = PipelineState()
        self._plan = plan
        self._compute = compute
        self._link = link
        self._update = update
        self._weights = weights
        self._meter = meter
        self._weight_drift = weight_drift
        self._listener = listener if listener is not None else _Nobody()
        self._next: Action | None = None
        # For who asks where this stage is, from another thread: the last finished action, the one at hand, and since when.
        self.finished: Action | None = None
        self.current: Action | None = None
        self.since_s = 0.0
        # Outputs wait here from their forward to their send, the next action.
        self._to_send: torch.Tensor | None = None
        self._perform = {
            Kind.RECV_FORWARD: link.post_receive_forward,
            Kind.FORWARD: self._forward,
            Kind.SEND_FORWARD: self._send_forward,
            Kind.RECV_BACKWARD: link.post_receive_backward,
            Kind.BACKWARD: self._backward,
            Kind.SEND_BACKWARD: self._send_backward,
            Kind.REPORT: self._report,
            Kind.TOTAL: update.pass_total,
        }

    def run_to_update(self) -> UpdateResult | None:
        """Perform actions up to and including the next UPDATE and return its result.

        Returns None where the next action's input is not there yet. That happens only between stages in one process; the
        link between processes waits instead.
        """
        while self.has_input():
            assert self._next is not None
            action, self._next = self._next, None
            if (result := self.perform(action)) is not None:
                return result
        return None

    def perform(self, action: Action) -> UpdateResult | None:
        """Perform one action, the plan's next; an UPDATE returns its result. For who has the plan of all stages here, and
        with it their turns (:class:`.turns.Turns`).
        """
        self.current, self.since_s = action, time.monotonic()
        if self.finished is None or self.finished.kind is Kind.UPDATE:
            self._link.post_receive_report()  # of the window that begins
        self._listener.begin(action)
        result = None
        # A range of this name in PyTorch's profiler and in nsys.
        with torch.profiler.record_function(str(action)):
            if action.kind is not Kind.UPDATE:
                self._perform[action.kind](action.index)
            else:
                with self._meter.computing(Kind.UPDATE):
                    self._weights.begin_update(self.state.in_flight)
                    result = self._update.apply(action.index)
                    self._weights.end_update()
                self._meter.count_update(successful=result.successful)
                self._meter.count_copies(self._weights.copied_bytes)
        self._listener.end()
        self.finished, self.current = action, None
        return result

    def has_input(self) -> bool:
        """Whether the next action can be performed now, if need be by waiting."""
        if self._next is None:
            self._next = next(self._plan)
        return self._link.has_input(self._next)

    @property
    def updates(self) -> int:
        """The updates done since the plan began."""
        return self._weights.version

    def finish(self) -> None:
        """End the plan at a drain; ``RuntimeError`` if anything is still in flight or under way."""
        if not self.state.is_drained():
            left = [entry.microbatch for entry in self.state.in_flight]
            raise RuntimeError(f"micro-batches {left} in flight at a drain: a bug in the plan")
        self._link.drain()
        self._update.finish()

    def _forward(self, microbatch: int) -> None:
        input_tensor = self._cast.received(self._link.receive_forward(microbatch))
        self._listener.received()
        version = self._weights.for_forward(microbatch)
        with self._meter.computing(Kind.FORWARD), self._weights.in_place(version):
            output_tensor = self._compute.forward(microbatch, input_tensor)
            if self._weight_drift is not None:
                self._weight_drift.forwarded(version)
        self.state.push(InFlight(microbatch, input_tensor, output_tensor, forward_version=version))
        self._meter.count_forward(in_flight=len(self.state.in_flight))
        self._to_send = output_tensor

    def _send_forward(self, microbatch: int) -> None:
        assert self._to_send is not None
        self._link.send_forward(microbatch, self._cast.to_send(self._to_send))
        self._compute.release_output(self._to_send)
        self._to_send = None

    def _backward(self, microbatch: int) -> None:
        output_gradient = self._cast.received(self._link.receive_backward(microbatch))
        self._listener.received()
        entry = self.state.pop(microbatch)
        version = self._weights.for_backward(entry)
        self._meter.count_backward(drift=version - entry.forward_version)
        with self._meter.computing(Kind.BACKWARD), self._weights.in_place(version):
            self._to_send = self._compute.backward(entry, output_gradient)
            if self._weight_drift is not None:
                self._weight_drift.backwarded(entry.forward_version, version)

    def _send_backward(self, microbatch: int) -> None:
        assert self._to_send is not None
        self._link.send_backward(microbatch, self._cast.to_send(self._to_send))
        self._to_send = None

    def _report(self, update: int) -> None:
        later = self._link.receive_report()
        self._link.post_receive_total()
        self._listener.received()
        with self._meter.computing(Kind.REPORT):
            self._update.report(update, later)
