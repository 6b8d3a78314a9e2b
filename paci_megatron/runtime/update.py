"""A stage's optimizer step: its own gradients, its own moment, no other stage waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .control import Control, Record
from .device import HostCopy
from .look_ahead import LookAhead
from .state import UpdateResult
from .steps import OptimizerSteps, is_part_of
from .tied_embeddings import TiedEmbedding


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
        after_step: Callable[[], None] = lambda: None,
        look_ahead: LookAhead | None = None,
        delay: float = 0.0,
    ) -> None:
        """``model`` is Megatron's data-parallel wrapper; ``finalize_gradients`` completes the window's gradients within
        the stage (data, tensor, context parallel); ``loop_optimizer`` is the optimizer as the
        training loop holds it, whose ``step`` steps this stage's, with gradients that are ready.
        ``own_figures`` is what the stage tells the others beside an update's gradients. ``after_step`` is called when an
        update is over, skipped or not. ``delay`` is by how many updates ``look_ahead`` is to look ahead while the pipeline
        is full. With a per-token loss
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
        self._after_step = after_step
        self._look_ahead = look_ahead
        self._delay = delay
        self._parameters = tuple(model.parameters())
        self._zero_gradients()

    def report(self, update: int, later: Record) -> None:
        """Complete the window's gradients, and tell the other stages what they need to know of them.

        ``later`` is the report of the later stages.
        """
        self._finalize_gradients()
        own_tokens, divided = None, None
        if self._take_num_tokens is not None:
            tokens = self._take_num_tokens()
            own_tokens = HostCopy(tokens) if tokens is not None else None
            divided = self._token_factor(tokens, later)
        if self._tied is not None:
            self._tied.report(divided)
        if divided is not None:
            self._model.scale_gradients(divided)
        self._optimizer.prepare_grads()
        if self._readings is not None:
            self._readings.begin()
        # Over the ranks that share the stage, see plugin/run.py. In steady state this is the update's only wait for the
        # device: everything else that the host reads has been copied by then.
        norm = float(self._optimizer.get_grad_norm()) / self._control.scale(update)
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
        tied_applies = True
        if self._tied is not None:
            tied_applies = self._tied.apply(update, control)
            self._optimizer.prepare_grads()  # which may have made copies of what has changed since
        self._scale_gradients(coefficient, control.scale(update))
        tied_weight = self._tied.weight if self._tied is not None else None
        # Micro-batches in flight saved these weights for their backward, which is to use the new ones (paper, section
        # 3); autograd's check against in-place changes would refuse that.
        with torch.autograd._unsafe_preserve_version_counter(self._parameters):
            if self._look_ahead is not None:
                self._look_ahead.delay = 0.0 if control.is_drained(update) else self._delay
            for step in self._steps.due(applies, tied_weight, tied_applies):
                with step:
                    self._loop_optimizer.step()
            if self._look_ahead is not None and not applies:
                self._look_ahead.reset()
        # Skipped or not: the stages must agree on the learning rate, and the others may not have skipped.
        self._scheduler.step(increment=self._samples_per_update)
        self._zero_gradients()
        self._after_step()
        return UpdateResult(applies, control.total(update).norm if control.is_drained(update) else None)

    def finish(self) -> None:
        """The plan ends at a drain."""
        if self._tied is not None:
            self._tied.finish()

    def _token_factor(self, own: torch.Tensor | None, later: Record) -> torch.Tensor:
        """What makes gradients of summed losses those of the mean, a scalar on the device, as Megatron computes it."""
        if own is None:
            own = torch.full((1,), int(later.num_tokens), dtype=torch.int64, device=self._parameters[0].device)
        return 1.0 / own.clamp(min=1).view(())

    def _scale_gradients(self, coefficient: float, loss_scale: float) -> None:
        """Clip and unscale what the optimizer will step with; the tied embedding's gradients are clipped already."""
        tied = self._tied.weight if self._tied is not None else None
        by_factor: dict[float, list[torch.Tensor]] = {}
        for parameter in self._optimizer.get_parameters():
            gradient = getattr(parameter, "decoupled_grad", None)  # where the precision-aware optimizer has it
            gradient = parameter.grad if gradient is None else gradient
            if gradient is not None:
                clipped = tied is not None and is_part_of(parameter, tied)
                by_factor.setdefault((1.0 if clipped else coefficient) / loss_scale, []).append(gradient)
        for factor, gradients in by_factor.items():
            if factor != 1.0:
                torch._foreach_mul_(gradients, factor)

    def _zero_gradients(self) -> None:
        """Clear both places Megatron keeps gradients in, or the next window would count this one again."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
