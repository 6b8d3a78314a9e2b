"""What a stage remembers from one train_step to the next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class InFlight:
    """A micro-batch forwarded at this stage and not yet backwarded.

    ``input_tensor`` is the received activation (None on the first stage) and ``output_tensor`` the one sent on, emptied
    of data after sending (the loss on the last stage). Both (sequence, micro-batch size, hidden).
    """

    microbatch: int
    input_tensor: torch.Tensor | None
    output_tensor: torch.Tensor
    forward_version: int


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did: whether it was applied, and the global gradient norm of its window, if that is known already."""

    successful: bool
    grad_norm: float | None = None


@dataclass
class PipelineState:
    """The stage's counters since the plan began, and its micro-batches in flight, oldest first."""

    forwards: int = 0
    backwards: int = 0
    in_flight: deque[InFlight] = field(default_factory=deque)

    def is_drained(self) -> bool:
        """Whether nothing is in flight here."""
        return not self.in_flight

    def push(self, entry: InFlight) -> None:
        """Record a forward; ``RuntimeError`` if it is not the next one."""
        if entry.microbatch != self.forwards:
            raise RuntimeError(f"forward of micro-batch {entry.microbatch}, but {self.forwards} is next: a bug in the plan")
        self.in_flight.append(entry)
        self.forwards += 1

    def pop(self, microbatch: int) -> InFlight:
        """Take the oldest micro-batch for its backward; ``RuntimeError`` if it is not ``microbatch``."""
        if not self.in_flight or self.in_flight[0].microbatch != microbatch:
            raise RuntimeError(f"backward of micro-batch {microbatch}, but {self.backwards} is next: a bug in the plan")
        self.backwards += 1
        return self.in_flight.popleft()
