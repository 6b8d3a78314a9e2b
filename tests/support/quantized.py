"""Megatron's local linear layers made to compute with quantised weights, for ``train``'s ``within``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

STEP = 1 / 512  # of the grid that weights are rounded to


def quantized(weight: torch.Tensor) -> torch.Tensor:
    return torch.round(weight.detach() / STEP) * STEP


class Copy:
    """A quantised weight that is kept, as Transformer Engine keeps them: written again in place, for all that hold it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.data = quantized(weight)

    def quantize_(self, weight: torch.Tensor) -> None:
        self.data.copy_(quantized(weight))


class CachedLinear(torch.autograd.Function):
    """Computes with the module's copy. The backward of a window's first forward overwrites the window's gradients."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.nn.Parameter, copy: Copy, is_first: bool) -> torch.Tensor:
        ctx.save_for_backward(given)
        ctx.weight, ctx.copy, ctx.is_first = weight, copy, is_first
        return given @ copy.data.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (given,), weight = gradients, ctx.saved_tensors, ctx.weight
        weight_gradient = gradient.flatten(0, 1).T @ given.flatten(0, 1)
        if ctx.is_first:
            weight.main_grad.copy_(weight_gradient)
        else:
            weight.main_grad.add_(weight_gradient)
        weight.grad_added_to_main_grad = True
        return gradient @ ctx.copy.data, torch.zeros_like(weight), None, None


class DirectLinear(torch.autograd.Function):
    """Computes, forward and backward, with the newest weight, quantised there and then: what the copies must amount to."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(given)
        ctx.weight = weight
        return given @ quantized(weight).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (given,) = gradients, ctx.saved_tensors
        return gradient @ quantized(ctx.weight), gradient.flatten(0, 1).T @ given.flatten(0, 1)


def _cached_forward(self: Any, input: torch.Tensor, weight: torch.nn.Parameter, bias: Any = None, **named: Any) -> Any:
    copies, is_first = self._fp8_workspaces, self.is_first_microbatch
    if "weight" not in copies:
        copies["weight"] = Copy(weight)
    elif is_first:
        copies["weight"].quantize_(weight)
    self.is_first_microbatch = False
    output = CachedLinear.apply(input, weight, copies["weight"], is_first)
    return output if bias is None else output + bias


def _direct_forward(self: Any, input: torch.Tensor, weight: torch.nn.Parameter, bias: Any = None, **named: Any) -> Any:
    output = DirectLinear.apply(input, weight)
    return output if bias is None else output + bias


def _set_is_first_microbatch(self: Any) -> None:
    for module in self.modules():
        if hasattr(module, "_fp8_workspaces"):
            module.is_first_microbatch = True


def _with_copies(init: Any) -> Any:
    def initialized(self: Any, *positional: Any, **named: Any) -> None:
        init(self, *positional, **named)
        self._fp8_workspaces, self.is_first_microbatch = {}, True

    return initialized


@contextlib.contextmanager
def quantized_linears(cached: bool, renewed: bool = True) -> Iterator[None]:
    """Inside, linear layers are quantised: ``cached`` in Transformer Engine's way, or each time that they are used. Copies
    that are not ``renewed`` at an update are those of the window's first forward.
    """
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule

    from paci_megatron.runtime.quantized import QuantizedCopies

    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, value)

        if not renewed:
            replace(QuantizedCopies, "exist", lambda self: False)
        # Megatron's own does nothing unless the configuration has fp8, which it demands Transformer Engine for.
        replace(MegatronModule, "set_is_first_microbatch", _set_is_first_microbatch)
        for linear in (ColumnParallelLinear, RowParallelLinear):
            replace(linear, "__init__", _with_copies(linear.__init__))
            replace(linear, "_forward_impl", _cached_forward if cached else _direct_forward)
        yield
