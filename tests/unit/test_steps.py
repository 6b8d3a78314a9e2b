"""After a skipped update the optimizer's state is what it was before, and the tied embedding's replicas stay the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.runtime.steps import OptimizerSteps


class Adam:
    """Adam that counts steps as Transformer Engine's and Apex's FusedAdam do, by group and before it looks at gradients, or
    as PyTorch's does, by parameter.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], by_group: bool) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters)}]
        self.state: dict[torch.Tensor, dict[str, Any]] = {}
        self._by_group = by_group

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        if self._by_group:
            group["step"] = group.get("step", 0) + 1
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state.setdefault(parameter, {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)})
            if not self._by_group:
                state["step"] = state.get("step", 0) + 1
            count = group["step"] if self._by_group else state["step"]
            state["m"].lerp_(parameter.grad, 0.1)
            state["v"].lerp_(parameter.grad.square(), 0.05)
            m, v = state["m"] / (1 - 0.9**count), state["v"] / (1 - 0.95**count)
            parameter.sub_(0.01 * m / (v.sqrt() + 1e-8))


class Optimizer:
    """Megatron's wrapper, as far as it is used."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], by_group: bool) -> None:
        self.optimizer = Adam(parameters, by_group)
        self.config = SimpleNamespace(reuse_grad_buf_for_mxfp8_param_ag=False)
        self.gradients: list[torch.Tensor] = []

    def step(self) -> None:
        self.optimizer.step()
        if self.config.reuse_grad_buf_for_mxfp8_param_ag:  # the new weights are gathered in the memory of all gradients
            for gradient in self.gradients:
                gradient.zero_()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.param_groups[0]["params"])

    def counts(self) -> list[Any]:
        return [self.param_groups[0].get("step"), *(state.get("step") for state in self.optimizer.state.values())]


def gradients(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, generator=generator) for _ in range(2)]


class Stage:
    """A weight of its own and, if there is one, the tied embedding, stepped update by update."""

    def __init__(self, by_group: bool, ties: bool, gathers_in_gradients: bool = False) -> None:
        self.own, self.tied = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
        self.optimizer = Optimizer([self.own, self.tied] if ties else [self.own], by_group)
        self.optimizer.config.reuse_grad_buf_for_mxfp8_param_ag = gathers_in_gradients
        self._steps, self._ties = OptimizerSteps(self.optimizer), ties

    def update(self, seed: int, applies: bool) -> None:
        self.own.grad, self.tied.grad = self.optimizer.gradients = gradients(seed)
        if not applies:
            self.own.grad = torch.full((4,), math.nan)
        for step in self._steps.due(applies, self.tied if self._ties else None):
            with step:
                self.optimizer.step()


@pytest.mark.parametrize("by_group", [True, False], ids=["by-group", "by-parameter"])
@pytest.mark.parametrize("skipped", [{1}, {2}, {2, 3}, {1, 4}])
def test_a_skipped_update_leaves_the_optimizer_as_it_was(by_group: bool, skipped: set[int]) -> None:
    stage, flush = Stage(by_group, ties=False), Stage(by_group, ties=False)
    for update in range(1, 6):
        stage.update(update, update not in skipped)
        if update not in skipped:  # Megatron's flush does not step at all
            flush.update(update, True)
    assert torch.equal(stage.own, flush.own)
    assert stage.optimizer.counts() == flush.optimizer.counts()


@pytest.mark.parametrize("by_group", [True, False], ids=["by-group", "by-parameter"])
@pytest.mark.parametrize("skipped", [{1}, {2}, {2, 3}, {1, 4}])
def test_the_tied_embedding_is_stepped_in_every_update_and_stays_the_same_on_both_stages(
    by_group: bool, skipped: set[int]
) -> None:
    first, last = Stage(by_group, ties=True), Stage(by_group, ties=True)  # the last stage cannot know and does not skip
    alone, flush = Stage(by_group, ties=False), Stage(by_group, ties=True)
    for update in range(1, 6):
        first.update(update, update not in skipped)
        last.update(update, True)
        flush.update(update, True)
        if update not in skipped:
            alone.update(update, True)
        assert torch.equal(first.tied, last.tied), update
    assert torch.equal(last.tied, flush.tied) and torch.equal(last.own, flush.own)
    assert torch.equal(first.own, alone.own), "what is not tied is as if the skipped updates had never been"
    if by_group:
        assert first.optimizer.counts()[0] == 5 - len(skipped)


def test_a_step_that_gathers_weights_in_the_gradients_memory_leaves_the_second_step_its_gradients() -> None:
    """``--reuse-grad-buf-for-mxfp8-param-ag``: once one of the two has skipped, each update is two steps."""
    usual, gathering = Stage(by_group=True, ties=True), Stage(by_group=True, ties=True, gathers_in_gradients=True)
    for update in range(1, 6):
        usual.update(update, update != 2)
        gathering.update(update, update != 2)
    assert torch.equal(usual.own, gathering.own) and torch.equal(usual.tied, gathering.tied)
