"""The look-ahead moves on by the last update of Adam, whoever counts the steps, and of Muon."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.runtime.look_ahead import LookAhead, is_muon

MODEL = SimpleNamespace(ddp_config=SimpleNamespace(use_distributed_optimizer=False))


def muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Orthogonalized by another function than Muon's, of any shape."""
    from emerging_optimizers.orthogonalized_optimizers import OrthogonalizedOptimizer

    class Orthogonalized(OrthogonalizedOptimizer):
        def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **_: Any) -> torch.Tensor:
            return grad / (1 + torch.linalg.vector_norm(grad))

    kinds: dict[str, Any] = {"weight_decay_method": "decoupled", "fp32_matmul_prec": "medium"}
    return Orthogonalized(groups, lr=0.01, momentum=0.9, weight_decay=0.0, nesterov=True, **kinds)


class Optimizer:
    """Megatron's of 16 bits around PyTorch's Adam or a Muon, as far as a look-ahead uses it."""

    def __init__(self, counts_by_group: bool = False, is_muon: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        main = [torch.randn(shape, generator=generator, requires_grad=True) for shape in ((3, 5), (4,), (2,))]
        self.without_main = torch.ones(3, requires_grad=True)
        groups: list[dict[str, Any]] = [{"params": main}, {"params": [self.without_main], "lr": 0.1}]
        self.optimizer = muon(groups) if is_muon else torch.optim.Adam(groups, lr=0.01)
        self.fp32_from_float16_groups = [main, []]
        self.model = [parameter.detach().bfloat16() for parameter in main]
        self.main = main
        self._counts_by_group = counts_by_group

    def step(self, number: int) -> None:
        """Step with gradients of its own, none for the last parameter."""
        generator = torch.Generator().manual_seed(number)
        for parameter in (*self.main[:2], self.without_main):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        if self._counts_by_group:  # as Transformer Engine's
            steps = [state.pop("step") for state in self.optimizer.state.values()]
            for group in self.optimizer.param_groups:
                group["step"] = int(steps[0])
        self._copy_main_params_to_model_params()
        if self._counts_by_group:
            for state, step in zip(self.optimizer.state.values(), steps, strict=True):
                state["step"] = step

    def _copy_main_params_to_model_params(self) -> None:
        for model, main in zip(self.model, self.main, strict=True):
            model.copy_(main.detach())


@pytest.mark.parametrize("kind", [{}, {"counts_by_group": True}, {"is_muon": True}], ids=["Adam", "by group", "Muon"])
def test_the_model_is_moved_on_and_the_main_parameters_are_not(kind: dict[str, bool]) -> None:
    ahead, plain = Optimizer(**kind), Optimizer(**kind)
    assert is_muon(ahead.optimizer) == ("is_muon" in kind)
    look_ahead = LookAhead(ahead, MODEL)
    look_ahead.delay = 1.75
    for number in range(3):
        before = [parameter.detach().clone() for parameter in plain.main]
        ahead.step(number)
        plain.step(number)
        for index, (parameter, old) in enumerate(zip(plain.main, before, strict=True)):
            new = parameter.detach()
            assert torch.equal(ahead.main[index], new)
            expected = (new + 1.75 * (new - old)).bfloat16()
            torch.testing.assert_close(ahead.model[index], expected, rtol=2**-8, atol=1e-4)
            assert torch.equal(ahead.model[index], plain.model[index]) == (index == 2), "the last one has no gradient"
        assert torch.equal(ahead.without_main, plain.without_main)
    look_ahead.reset()
    assert all(map(torch.equal, ahead.model, plain.model))


def test_without_a_delay_and_in_a_part_without_parameters_nothing_changes() -> None:
    ahead, plain = Optimizer(False), Optimizer(False)
    LookAhead(SimpleNamespace(chained_optimizers=[ahead, SimpleNamespace(is_stub_optimizer=True)]), MODEL)
    ahead.step(1)
    plain.step(1)
    assert all(map(torch.equal, ahead.model, plain.model))
