"""PACI in plain PyTorch, as the paper describes it: the reference that everything else is compared with.

No executor and no plan: two nested loops, over time and over stages. On a clock in which every forward and every backward
takes one tick, stage s of N forwards micro-batch m at tick s+2m and backwards it at tick 2N-1-s+2m. So N-s micro-batches are
in flight at stage s, and each stage updates its weights after every a backwards, without waiting for the others.
"""

from __future__ import annotations

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


def train(stages: Sequence[ReferenceStage], microbatches_per_update: int, updates: int) -> list[list[int]]:
    """Train for that many updates of each stage; returns each stage's drifts by micro-batch, in updates."""
    num_stages, a = len(stages), microbatches_per_update
    total = a * updates
    activations: dict[tuple[int, int], torch.Tensor] = {}  # by receiving stage and micro-batch
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    graphs: dict[tuple[int, int], tuple[torch.Tensor | None, torch.Tensor, int]] = {}
    sums = [[torch.zeros_like(p) for p in stage.parameters] for stage in stages]
    version = [0] * num_stages
    drifts: list[list[int]] = [[] for _ in stages]

    for tick in range(2 * num_stages + 2 * total):
        for s, stage in enumerate(stages):
            m, waits = divmod(tick - s, 2)
            if not waits and 0 <= m < total:
                x = activations.pop((s, m)).requires_grad_() if s > 0 else None
                y = stage.forward(m, x)
                graphs[s, m] = x, y, version[s]
                activations[s + 1, m] = y.detach().clone()
            m, waits = divmod(tick - (2 * num_stages - 1 - s), 2)
            if not waits and 0 <= m < total:
                x, y, forward_version = graphs.pop((s, m))
                drifts[s].append(version[s] - forward_version)
                # The graph holds the parameters themselves, whose values are by now the newest.
                inputs = [*([] if x is None else [x]), *stage.parameters]
                found = list(torch.autograd.grad(y, inputs, gradients.pop((s, m), None)))
                if x is not None:
                    gradients[s - 1, m] = found.pop(0)
                for accumulated, gradient in zip(sums[s], found, strict=True):
                    accumulated += gradient
                if (m + 1) % a == 0:
                    update(stage, sums[s])
                    version[s] += 1
    return drifts


def update(stage: ReferenceStage, sums: list[torch.Tensor]) -> None:
    """Make the next weight version from the summed gradients, and put it in place under the graphs in flight."""
    for weight, accumulated in zip(stage.weights, sums, strict=True):
        weight.grad = accumulated.clone()
        accumulated.zero_()
    stage.optimizer.step()
    for parameter, weight in zip(stage.parameters, stage.weights, strict=True):
        parameter.data.copy_(weight.data)
