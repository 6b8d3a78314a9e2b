"""The embedding matrix that the first and last stage share, kept the same on both without a stall.

Each has a replica, and a part of the gradient. After each window the two exchange their parts and apply the sum ``lag``
updates later, when it is there without waiting; at a drain they apply all that is pending. So both replicas see the same
gradients in the same order, scaled alike by the global norm of the window they come from, and stay equal in every bit.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch

from .control import Control


class TensorExchange(Protocol):
    """Tensors of one shape to and from one other stage, in order."""

    def send(self, tensor: torch.Tensor) -> None:
        """Send ``tensor``, which stays as it is, and get ready for the other's; returns at once."""

    def receive(self) -> torch.Tensor:
        """Wait for the other's earliest tensor not yet taken."""

    def drain(self) -> None:
        """Wait until the other has everything sent; ``RuntimeError`` if a tensor of the other's has not been taken."""


class TiedEmbedding:
    """One stage's replica. Both stages call the same methods for the same updates."""

    def __init__(self, weight: torch.nn.Parameter, exchange: TensorExchange, is_first_stage: bool, lag: int) -> None:
        """``weight`` has Megatron's ``main_grad``, (vocabulary, hidden)."""
        self.weight = weight
        self._exchange = exchange
        self._is_first_stage = is_first_stage
        self._lag = lag
        self._parts: deque[torch.Tensor] = deque()  # of this stage, whose other part has not been taken yet
        self._sums: deque[tuple[int, torch.Tensor]] = deque()  # by update, to be applied
        self._divisions: deque[torch.Tensor | None] = deque()  # of the updates that are still to be applied
        self._updates = 0

    @property
    def _gradient(self) -> torch.Tensor:
        return self.weight.main_grad  # type: ignore[attr-defined]  # Megatron's

    def report(self, division: torch.Tensor | None = None) -> None:
        """A window's gradient is complete here. On the first stage, which counts it in the norm, make it the sum.

        ``division`` is what all gradients of the window are multiplied by next, a scalar.
        """
        self._divisions.append(division)
        part = self._gradient.detach().clone()
        self._exchange.send(part)
        self._parts.append(part)
        self._updates += 1
        if self._is_first_stage:
            # The last stage was done with this window before its gradients came here.
            self._take_sum()
            self._gradient.copy_(self._sums[-1][1])

    def apply(self, update: int, control: Control) -> bool:
        """Make ``main_grad`` what ``update`` is to apply, at its loss scale: the sums that are due, but for those that are
        not finite. False if there are none but such: then it is not to be applied, on either stage.
        """
        up_to = update if control.is_drained(update) else update - self._lag
        total = torch.zeros_like(self._gradient, dtype=torch.float32)
        due = finite = 0
        while self._first_pending() <= up_to:
            if not self._sums:
                self._take_sum()
            window, gradient = self._sums.popleft()
            if (division := self._divisions.popleft()) is not None:
                gradient.mul_(division)
            due += 1
            if control.total(window).is_finite:
                finite += 1
                total.add_(gradient.float().mul_(control.tied_coefficient(window, update)))
        largest = torch.finfo(self._gradient.dtype).max  # a larger scale than its own window's can be too much for fp16
        self._gradient.copy_(total.clamp_(-largest, largest))
        return finite > 0 or due == 0

    def finish(self) -> None:
        """The plan ends at a drain, where all has been applied: what the other stage is still to get must get there."""
        self._exchange.drain()

    def _first_pending(self) -> int:
        return self._updates + 1 - len(self._parts) - len(self._sums)

    def _take_sum(self) -> None:
        part = self._parts.popleft()
        # Into what was received: this stage's part may still be under way.
        self._sums.append((self._updates - len(self._parts), self._exchange.receive().add_(part)))
