"""PACI in plain PyTorch, as the paper describes it: the reference that everything else is compared with.

No executor and no plan: two nested loops, over time and over stages. On a clock in which every forward and every backward
takes one tick, stage s of N forwards micro-batch m at tick s+2m and backwards it at tick 2N-1-s+2m. So N-s micro-batches are
in flight at stage s, and each stage updates its weights after every a backwards, without waiting for the others. To have e
more in flight, a stage backwards 2e ticks later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Forward = Callable[[int, torch.Tensor | None], torch.Tensor]


@dataclass
class ReferenceStage:
    """``forward(m, activation)`` is the stage's output for micro-batch m: an activation, or the loss on the last stage.

    ``weights`` are the newest version of ``parameters``, and what the optimizer steps.
    """

    forward: Forward
    parameters: list[torch.nn.Parameter]
    weights: list[torch.Tensor]
    optimizer: torch.optim.Optimizer
    norm: Callable[[list[torch.Tensor]], float]  # of the gradients that this stage counts
    tied: int | None = None  # which of the parameters the first and last stage share


def train(
    stages: Sequence[ReferenceStage],
    microbatches_per_update: int,
    updates: int,
    policy: str = "latest",
    max_norm: float = 0.0,
    more: Sequence[int] | None = None,
) -> list[list[int]]:
    """Train for that many updates of each stage; returns each stage's drifts by micro-batch, in updates.

    ``policy`` is latest (PACI), stash (PipeDream) or double-buffer (PipeDream-2BW). ``max_norm`` clips globally, if not 0.
    Stage s has ``more[s]`` more micro-batches in flight than PACI has of itself.
    The last update comes when all stages have finished.
    """
    num_stages, a = len(stages), microbatches_per_update
    total = a * updates
    activations: dict[tuple[int, int], torch.Tensor] = {}  # by receiving stage and micro-batch
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    graphs: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor, int]] = {}
    sums = [[torch.zeros_like(p) for p in stage.parameters] for stage in stages]
    version = [0] * num_stages
    history = [[[p.detach().clone() for p in stage.parameters]] for stage in stages]  # every version there was
    drifts: list[list[int]] = [[] for _ in stages]
    more = [0] * num_stages if more is None else more
    windows = Windows(stages, a, max_norm, more[0])

    for tick in range(2 * num_stages + 2 * more[0] + 2 * total):
        for s, stage in enumerate(stages):
            m, waits = divmod(tick - s, 2)
            if not waits and 0 <= m < total:
                x = activations.pop((s, m)).requires_grad_() if s > 0 else None
                forward_version = max(m // a - 1, 0) if policy == "double-buffer" else version[s]
                put(history[s][forward_version], stage)
                y = stage.forward(m, x)
                graphs[s, m] = x, y, forward_version
                activations[s + 1, m] = y.detach().clone()
            m, waits = divmod(tick - (2 * num_stages - 1 - s + 2 * more[s]), 2)
            if not waits and 0 <= m < total:
                x, y, forward_version = graphs.pop((s, m))
                backward_version = version[s] if policy == "latest" else forward_version
                drifts[s].append(backward_version - forward_version)
                # The graph holds the parameters themselves: it sees the values that they have now.
                put(history[s][backward_version], stage)
                inputs = [*([] if x is None else [x]), *stage.parameters]
                found = list(torch.autograd.grad(y, inputs, gradients.pop((s, m), None)))
                if x is not None:
                    gradients[s - 1, m] = found.pop(0)
                for accumulated, gradient in zip(sums[s], found, strict=True):
                    accumulated += gradient
                if (m + 1) % a == 0:
                    windows.close(s, sums[s])
                    if m + 1 < total:
                        version[s] += 1
                        windows.update(s, version[s])
                        history[s].append([weight.detach().clone() for weight in stage.weights])
    for s, stage in enumerate(stages):
        windows.update(s, updates, drained=True)
        put(stage.weights, stage)
    return drifts


def put(values: Sequence[torch.Tensor], stage: ReferenceStage) -> None:
    """Give the stage's parameters these values, under the graphs in flight."""
    for parameter, value in zip(stage.parameters, values, strict=True):
        parameter.data.copy_(value)


class Windows:
    """The gradients of all windows of all stages, and the updates made from them. Windows and updates count from 1."""

    def __init__(self, stages: Sequence[ReferenceStage], a: int, max_norm: float, extra: int) -> None:
        self.stages = stages
        self.lag = -(-(len(stages) + extra) // a)  # updates after which a global norm, or a tied gradient, is used
        self.max_norm = max_norm
        self.gradients: list[list[list[torch.Tensor]]] = [[] for _ in stages]
        self.squares: list[list[float]] = [[] for _ in stages]
        self.tied_done = [0] * len(stages)

    def close(self, s: int, sums: list[torch.Tensor]) -> None:
        """A window of stage s is complete: keep its gradients and their squared norm, and clear the sums."""
        counted = [g.clone() for g in sums]
        self.gradients[s].append(counted)
        for g in sums:
            g.zero_()
        tied = self.stages[s].tied
        if tied is not None and s == 0:  # the sum of both parts counts here, and not on the last stage
            counted = [*counted]
            counted[tied] = self.tied_sum(len(self.gradients[0]))
        norm = self.stages[s].norm(counted)
        self.squares[s].append(norm * norm)

    def tied_sum(self, k: int) -> torch.Tensor:
        parts = []
        for s in (0, -1):
            tied = self.stages[s].tied
            assert tied is not None
            parts.append(self.gradients[s][k - 1][tied])
        return parts[0] + parts[1]

    def norm(self, k: int, from_stage: int = 0) -> float:
        """The norm of window k over this stage and the later ones; not finite if a gradient is not."""
        total = 0.0
        for squares in reversed(self.squares[from_stage:]):
            total = squares[k - 1] + total
        return math.sqrt(total) if math.isfinite(total) else total

    def coefficient(self, norm: float) -> float:
        return min(self.max_norm / (norm + 1e-6), 1.0) if self.max_norm else 1.0

    def update(self, s: int, k: int, drained: bool = False) -> None:
        """Update k of stage s: skipped if its gradients or later stages' are not finite, clipped by what is known."""
        stage = self.stages[s]
        known = self.norm(k, 0 if drained else s)
        earlier = self.norm(k - self.lag) if k > self.lag else 0.0
        largest = known if drained or not math.isfinite(earlier) else max(known, earlier)
        for weight, gradient in zip(stage.weights, self.gradients[s][k - 1], strict=True):
            weight.grad = gradient * self.coefficient(largest) if math.isfinite(known) else None
        if stage.tied is not None:
            gradient = torch.zeros_like(stage.weights[stage.tied])
            due = range(self.tied_done[s] + 1, (k if drained else k - self.lag) + 1)
            for window in due:
                self.tied_done[s] = window
                if math.isfinite(self.norm(window)):
                    gradient += self.tied_sum(window) * self.coefficient(self.norm(window))
            lost = due and not any(math.isfinite(self.norm(window)) for window in due)
            stage.weights[stage.tied].grad = gradient if not lost else None
        stage.optimizer.step()
