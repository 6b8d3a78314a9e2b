"""A stage's optimizer step: its own gradients, its own moment, no other stage involved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did: whether it was applied, and the gradient norm that was clipped by (None if not clipped)."""

    successful: bool
    grad_norm: float | None


class StageUpdate:
    """Applies a window's gradients to this stage's weights, on stock PyTorch and Megatron's optimizer."""

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        finalize_gradients: Callable[[], None],
        samples_per_update: int,
    ) -> None:
        """``model`` is Megatron's data-parallel wrapper; ``finalize_gradients`` completes the window's gradients within the
        stage (data, tensor, context parallel).
        """
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._finalize_gradients = finalize_gradients
        self._samples_per_update = samples_per_update
        self._parameters = tuple(model.parameters())
        self.zero_gradients()

    def apply(self) -> UpdateResult:
        """Finalize gradients, step the optimizer and its schedule, zero the gradients."""
        self._finalize_gradients()
        # Micro-batches in flight saved these weights for their backward, which is to use the new ones (paper, section
        # 3); autograd's check against in-place changes would refuse that.
        with torch.autograd._unsafe_preserve_version_counter(self._parameters):
            successful, grad_norm, _ = self._optimizer.step()
        if successful:
            self._scheduler.step(increment=self._samples_per_update)
        self.zero_gradients()
        return UpdateResult(bool(successful), grad_norm)

    def zero_gradients(self) -> None:
        """Clear both places Megatron keeps gradients in, or the next window would count this one again."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
