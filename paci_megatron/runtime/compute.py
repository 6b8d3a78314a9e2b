"""A stage's forward and backward, by Megatron's own ``forward_step`` and ``backward_step``."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from .loss_scale import LossScale
from .param_gather import ParamGather
from .quantized import QuantizedCopies
from .state import InFlight

_AUXILIARY = (MoEAuxLossAutoScaler, DSAIndexerLossAutoScaler)
"""Where Megatron's forwards leave, for the backwards, the scale of losses that a layer has of its own."""


class StageCompute:
    """Runs one micro-batch through this stage's model part.

    ``forward_step_func`` and ``data_iterator`` are Megatron's, set before each run; ``losses`` collects what the last
    stage's loss function returns to be logged, one entry a micro-batch, in order.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        *,
        microbatches_per_update: int,
        in_flight_cap: int,
        is_last_stage: bool,
        context_parallel_size: int,
        loss_scale: LossScale,
    ) -> None:
        self.model = model
        self.config = config
        self.param_gather = ParamGather(model)
        self._quantized = QuantizedCopies(model)
        self.forward_step_func: Callable[..., Any] | None = None
        self.data_iterator: Iterator[Any] | None = None
        self.losses: list[Any] = []
        self.num_tokens: list[torch.Tensor] = []  # by micro-batch, on the last stage
        self._windows_seen = 0  # that are still in ``losses``
        self._microbatches_per_update = microbatches_per_update
        self._in_flight_cap = in_flight_cap
        self._is_last_stage = is_last_stage
        self._context_parallel_size = context_parallel_size
        self._loss_scale = loss_scale
        self._auxiliary_scales: deque[list[torch.Tensor | None]] = deque()  # of the micro-batches in flight

    def forward(self, microbatch: int, input_tensor: torch.Tensor | None) -> torch.Tensor:
        """The stage's output for ``microbatch``: an activation to send, or on the last stage the scaled loss."""
        position = microbatch % self._microbatches_per_update
        self._scale_as(microbatch)
        self.param_gather.before_forward()
        output_tensor, num_tokens = schedules.forward_step(
            self.forward_step_func,
            self.data_iterator,
            self.model,
            self._microbatches_per_update,
            input_tensor,
            self.losses,
            self.config,
            cp_group_size=self._context_parallel_size,
            checkpoint_activations_microbatch=self._checkpoints_activations(microbatch),
            # First of its window: its backward is the first to write the window's gradients, and with Transformer Engine in
            # fp8 overwrites what is there.
            is_first_microbatch=position == 0,
            current_microbatch=position,
            is_last_stage=self._is_last_stage,
        )
        if self._loss_scale.is_used:
            set_now = (scaler.main_loss_backward_scale for scaler in _AUXILIARY)
            self._auxiliary_scales.append([scale.clone() if scale is not None else None for scale in set_now])
        if self._is_last_stage and self.config.calculate_per_token_loss:
            self.num_tokens.append(num_tokens)
        return output_tensor

    def release_output(self, output_tensor: torch.Tensor) -> None:
        """Free the data of an output that has been handed to the link; its graph stays for the backward."""
        schedules.deallocate_output_tensor(output_tensor, self.config.deallocate_pipeline_outputs)

    def backward(self, entry: InFlight, output_gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Accumulate ``entry``'s gradients; returns that of its input, None on the first stage.

        Data-parallel gradient reduction may overlap only the last backward of a window, the one that completes the
        sums.
        """
        completes_window = (entry.microbatch + 1) % self._microbatches_per_update == 0
        self._scale_as(entry.microbatch)
        if self._loss_scale.is_used:  # forwards of a later window may have set another
            for scaler, scale in zip(_AUXILIARY, self._auxiliary_scales.popleft(), strict=True):
                scaler.main_loss_backward_scale = scale
        overlaps = self.config.no_sync_func is not None
        self.param_gather.complete()
        with self.model.no_sync() if overlaps and not completes_window else contextlib.nullcontext():
            return schedules.backward_step(entry.input_tensor, entry.output_tensor, output_gradient, self.config)

    def renew_copies(self) -> None:
        """An update was applied: the next action may be a forward or a backward of any micro-batch."""
        if self._quantized.exist():
            self.param_gather.complete()
            self._quantized.renew()

    def window_loss(self) -> torch.Tensor:
        """The mean loss of the oldest window that it has not been asked of, a scalar; for the last stage."""
        begin = self._windows_seen * self._microbatches_per_update
        self._windows_seen += 1
        losses = self.losses[begin : begin + self._microbatches_per_update]
        values = torch.stack([next(iter(loss.values())).view(-1).float() for loss in losses])  # (micro-batches, 1 or 2)
        total = values.sum(dim=0)
        return total[0] / (total[1] if len(total) > 1 else len(values))

    def take_losses(self) -> list[Any]:
        """What the loss function returned for the oldest window, removed; empty on stages without a loss."""
        taken = self.losses[: self._microbatches_per_update]
        del self.losses[: self._microbatches_per_update]
        self._windows_seen = max(self._windows_seen - 1, 0)
        return taken

    def take_num_tokens(self) -> torch.Tensor:
        """The tokens of the oldest window, (1,), removed. For the last stage, under a per-token loss."""
        taken = self.num_tokens[: self._microbatches_per_update]
        del self.num_tokens[: self._microbatches_per_update]
        return torch.stack(taken).sum().view(1)

    def _scale_as(self, microbatch: int) -> None:
        """Let Megatron multiply losses by the scale of ``microbatch``'s window."""
        if self._loss_scale.is_used:
            scale = self._loss_scale.of(microbatch // self._microbatches_per_update + 1)
            self.config.grad_scale_func = lambda loss: torch.full((1,), scale, device=loss.device) * loss

    def _checkpoints_activations(self, microbatch: int) -> bool | None:
        """Whether to recompute all layers of this micro-batch; None to follow the configuration."""
        partial = self.config.num_microbatches_with_partial_activation_checkpoints
        return None if partial is None else microbatch % self._in_flight_cap >= partial
