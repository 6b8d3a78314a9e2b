"""A stage's optimizer step: its own gradients, its own moment, no other stage waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .control import Control, Record
from .device import HostCopy
from .steps import OptimizerSteps
from .tied_embeddings import TiedEmbedding


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did: whether it was applied, and the global gradient norm of its window, if that is known already."""

    successful: bool
    grad_norm: float | None


class WindowReadings(Protocol):
    """What else a window has to tell the host."""

    def begin(self) -> None:
        """The window's work is queued: start copying. Returns at once."""

    def end(self) -> None:
        """The device has been waited for: act on what was copied."""


class StageUpdate:
    """Applies a window's gradients to this stage's weights, on stock PyTorch and Megatron's optimizer."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        control: Control,
        finalize_gradients: Callable[[], None],
        steps: OptimizerSteps,
        loop_optimizer: Any,
        samples_per_update: int,
        take_num_tokens: Callable[[], torch.Tensor | None] | None = None,
        readings: WindowReadings | None = None,
        own_figures: Callable[[int], Record] = lambda update: Record(),
        tied: TiedEmbedding | None = None,
    ) -> None:
        """``model`` is Megatron's data-parallel wrapper; ``finalize_gradients`` completes the window's gradients within
        the stage (data, tensor, context parallel); ``loop_optimizer`` is the optimizer as the
        training loop holds it, whose ``step`` steps this stage's, with gradients that are ready.
        ``own_figures`` is what the stage tells the others beside an update's gradients. With a per-token loss
        ``take_num_tokens`` is the window's number of tokens, (1,), None on all but the last stage.
        """
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._control = control
        self._finalize_gradients = finalize_gradients
        self._samples_per_update = samples_per_update
        self._take_num_tokens = take_num_tokens
        self._own_figures = own_figures
        self._steps = steps
        self._loop_optimizer = loop_optimizer
        self._readings = readings
        self._tied = tied
        self._parameters = tuple(model.parameters())
        self._zero_gradients()

    def report(self, update: int, later: Record) -> None:
        """Complete the window's gradients, and tell the other stages what they need to know of them.

        ``later`` is the report of the later stages.
        """
        self._finalize_gradients()
        own_tokens = self._divide_by_tokens(later) if self._take_num_tokens is not None else None
        if self._tied is not None:
            self._tied.report()
        self._optimizer.prepare_grads()
        if self._readings is not None:
            self._readings.begin()
        # Over the ranks that share the stage, see plugin/run.py. In steady state this is the update's only wait for the
        # device: everything else that the host reads has been copied by then.
        norm = float(self._optimizer.get_grad_norm())
        if self._readings is not None:
            self._readings.end()
        num_tokens = float(own_tokens.wait()) if own_tokens is not None else 0.0
        own = self._own_figures(update)._replace(squared_norm=norm * norm, num_tokens=num_tokens)
        self._control.report(update, own, later)

    def pass_total(self, update: int) -> None:
        """See :meth:`Control.pass_total`."""
        self._control.pass_total(update)

    def apply(self, update: int) -> UpdateResult:
        """Clip, step the optimizer and its schedule, zero the gradients; skip the step if a gradient is not finite."""
        control = self._control
        applies = control.may_apply(update)
        coefficient = control.coefficient(update) if applies else 1.0
        if coefficient < 1.0:
            self._model.scale_gradients(coefficient)
        if self._tied is not None:
            self._tied.apply(update, control)
        if coefficient < 1.0 or self._tied is not None:
            self._optimizer.prepare_grads()  # which may have made copies of what has changed since
        # Micro-batches in flight saved these weights for their backward, which is to use the new ones (paper, section
        # 3); autograd's check against in-place changes would refuse that.
        with torch.autograd._unsafe_preserve_version_counter(self._parameters):
            self._steps.step(self._loop_optimizer, applies, self._tied.weight if self._tied is not None else None)
        # Skipped or not: the stages must agree on the learning rate, and the others may not have skipped.
        self._scheduler.step(increment=self._samples_per_update)
        self._zero_gradients()
        return UpdateResult(applies, control.total(update).norm if control.is_drained(update) else None)

    def finish(self) -> None:
        """The plan ends at a drain."""
        if self._tied is not None:
            self._tied.finish()

    def _divide_by_tokens(self, later: Record) -> HostCopy | None:
        """Make gradients of summed losses those of the mean; the last stage's number of tokens, on its way to the host."""
        assert self._take_num_tokens is not None
        num_tokens = self._take_num_tokens()
        if num_tokens is None:
            self._model.scale_gradients(1.0 / max(later.num_tokens, 1.0))
            return None
        # Divided on the device, in double precision and then rounded, as the other stages' hosts do.
        self._model.scale_gradients(1.0 / num_tokens.double().clamp(min=1.0).view(()))
        return HostCopy(num_tokens)

    def _zero_gradients(self) -> None:
        """Clear both places Megatron keeps gradients in, or the next window would count this one again."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
