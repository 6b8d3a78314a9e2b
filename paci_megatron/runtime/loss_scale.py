"""The loss scale of mixed precision: one for all micro-batches of a window, the same on every stage, and never waited for.

Megatron's rule chooses a scale after each update, from whether a gradient of any stage was not finite. Here that is in
the update's total, which every stage has before it forwards the first micro-batch of the window ``lag + 1`` updates later
(see ``schedule/records.py``): so that window is the first to have the scale chosen after the update, on all stages. After a
drain it is the next one, as under a flush.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from .steps import parts_of


class LossScale:
    """What the losses of each window are multiplied by, and its gradients divided by.

    One object serves all plans of a stage. The rule is that of Megatron's ``grad_scaler``. While a plan runs the optimizer
    has none, because with one it would ask other stages in every update; at a drain it has it back, for a checkpoint. The
    parts of a chained optimizer have one scale here: in Megatron each has its own, and the loss is multiplied by the first.
    """

    def __init__(self, optimizer: Any) -> None:
        """``optimizer`` is Megatron's. The scale is 1 where it has no ``grad_scaler``."""
        self._parts = [
            (part, part.grad_scaler) for part in parts_of(optimizer) if getattr(part, "grad_scaler", None) is not None
        ]
        self._rule: Any = None  # on the host, while a plan runs
        self._lag = 0
        self._scales: dict[int, float] = {}  # by window, from lag + 2 on
        self._initial = 1.0
        self.latest = 1.0  # the scale chosen last, of the window lag + 1 updates later, or of the next after a drain

    @property
    def is_used(self) -> bool:
        """Whether there is anything to scale."""
        return bool(self._parts)

    def begin_plan(self, lag: int) -> None:
        """A plan of that record lag begins. Windows and updates count from 1."""
        self._lag, self._scales = lag, {}
        if self.is_used:
            self._rule = _on_host(self._parts[0][1])
            self._initial = self.latest = float(self._rule.scale)
            for part, _ in self._parts:
                part.grad_scaler = None

    def hear(self, update: int, is_finite: bool) -> None:
        """Whether all gradients of ``update`` are finite, on all stages; told in order."""
        if self.is_used:
            self._rule.update(not is_finite)
            self.latest = self._scales[update + self._lag + 1] = float(self._rule.scale)
            self._scales.pop(update - 2 * self._lag - 1, None)

    def of(self, window: int) -> float:
        """The scale of ``window``, known from the total of ``lag + 1`` updates before on."""
        return self._scales[window] if self.is_used and window > self._lag + 1 else self._initial

    def end_plan(self) -> None:
        """The plan ends at a drain."""
        for part, scaler in self._parts:
            scaler.load_state_dict(self._rule.state_dict())
            part.grad_scaler = scaler
        self._rule = None


def _on_host(scaler: Any) -> Any:
    """A copy of Megatron's scaler with its numbers on the host, where they are needed."""
    copied = copy.copy(scaler)
    for name, value in vars(scaler).items():
        if isinstance(value, torch.Tensor):
            setattr(copied, name, value.cpu())
    return copied
