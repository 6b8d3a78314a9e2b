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


def train(
    stages: Sequence[ReferenceStage], microbatches_per_update: int, updates: int, policy: str = "latest"
) -> list[list[int]]:
    """Train for that many updates of each stage; returns each stage's drifts by micro-batch, in updates.

    ``policy`` is latest (PACI), stash (PipeDream) or double-buffer (PipeDream-2BW).
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

    for tick in range(2 * num_stages + 2 * total):
        for s, stage in enumerate(stages):
            m, waits = divmod(tick - s, 2)
            if not waits and 0 <= m < total:
                x = activations.pop((s, m)).requires_grad_() if s > 0 else None
                forward_version = max(m // a - 1, 0) if policy == "double-buffer" else version[s]
                put(history[s][forward_version], stage)
                y = stage.forward(m, x)
                graphs[s, m] = x, y, forward_version
                activations[s + 1, m] = y.detach().clone()
            m, waits = divmod(tick - (2 * num_stages - 1 - s), 2)
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
                    update(stage, sums[s])
                    history[s].append([weight.detach().clone() for weight in stage.weights])
                    version[s] += 1
    for s, stage in enumerate(stages):
        put(history[s][-1], stage)
    return drifts


def put(values: Sequence[torch.Tensor], stage: ReferenceStage) -> None:
    """Give the stage's parameters these values, under the graphs in flight."""
    for parameter, value in zip(stage.parameters, values, strict=True):
        parameter.data.copy_(value)


def update(stage: ReferenceStage, sums: list[torch.Tensor]) -> None:
    """Make the next weight version from the summed gradients."""
    for weight, accumulated in zip(stage.weights, sums, strict=True):
        weight.grad = accumulated.clone()
        accumulated.zero_()
    stage.optimizer.step()
