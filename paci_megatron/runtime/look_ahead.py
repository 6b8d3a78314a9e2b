"""A look-ahead without a copy of the weights: a forward meets about the weights that its backward will meet."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .steps import parts_of


class LookAhead:
    """Writes a stage's model weights as the optimizer's main parameters, moved on by ``delay`` times their last update.

    In 16 bits Megatron's optimizer keeps main parameters in fp32 and casts them into the model's after each step. Training
    goes on from the main ones, so what the model holds may be something else: here, what the main ones are going to be
    ``delay`` updates later if each is like the last. An update is Adam's lr * m / (sqrt(v) + eps), from the moments as
    the step leaves them, or Muon's, as the step made it; without weight decay, which is far smaller. While it is cast, the
    result lies in the gradients' memory, which a step is done with. Parameters without a main one or a gradient are cast
    as they are.
    """

    def __init__(self, optimizer: Any, model: Any) -> None:
        """``optimizer`` is Megatron's, ``model`` its data-parallel wrapper, of a stage."""
        self.delay = 0.0  # updates; 0 casts as Megatron does
        self._model = model
        self._optimizer = optimizer
        self._parts = [part for part in parts_of(optimizer) if not getattr(part, "is_stub_optimizer", False)]
        for part in self._parts:
            if is_muon(part.optimizer):
                _keep_updates(part.optimizer)
            part._copy_main_params_to_model_params = functools.partial(
                self._cast_ahead, part, part._copy_main_params_to_model_params
            )

    def reset(self) -> None:
        """Make the model's weights those of the main parameters, after an update that was skipped."""
        self.delay = 0.0
        for part in self._parts:
            part._copy_main_params_to_model_params()
        config = self._model.ddp_config
        if config.use_distributed_optimizer and not config.overlap_param_gather:  # or the next forward gathers, as always
            self._model.start_param_sync(force_sync=True)
        elif hasattr(self._optimizer, "allgather_params"):  # the layer-wise optimizer without a buffer of parameters
            self._optimizer.allgather_params()

    def _cast_ahead(self, part: Any, cast: Callable[[], None]) -> None:
        with _moved_on(part, self.delay) if self.delay else contextlib.nullcontext():
            cast()


def is_muon(optimizer: Any) -> bool:
    """Whether this is an orthogonalized optimizer of the package emerging-optimizers, or of one that is called alike."""
    return hasattr(optimizer, "pre_weight_update_fn_inplace")


def _keep_updates(optimizer: Any) -> None:
    """Have Muon write each update into its gradient, which it is done with: it keeps no moment to read the update from."""
    before = optimizer.pre_weight_update_fn_inplace

    def keep(parameter: torch.Tensor, update: torch.Tensor) -> None:
        before(parameter, update)
        assert parameter.grad is not None
        parameter.grad.copy_(update)

    optimizer.pre_weight_update_fn_inplace = keep


@contextlib.contextmanager
def _moved_on(part: Any, delay: float) -> Iterator[None]:
    """Inside, the optimizer's main parameters are what they would be ``delay`` updates later; their gradients are lost."""
    groups = getattr(part, "shard_fp32_from_float16_groups", None) or part.fp32_from_float16_groups
    main = {id(parameter) for group in groups for parameter in group}
    now = []
    for group in part.optimizer.param_groups:
        moved = [each for each in group["params"] if id(each) in main and each.grad is not None]
        if moved:
            _move_on(part.optimizer, group, moved, delay)
        now += [(parameter, parameter.data) for parameter in moved]
    for parameter, _ in now:
        parameter.data = parameter.grad
    try:
        yield
    finally:
        for parameter, data in now:
            parameter.data = data


@torch.no_grad()
def _move_on(optimizer: Any, group: dict[str, Any], parameters: list[torch.Tensor], delay: float) -> None:
    """Write ``parameters`` of a ``group``, as they would be ``delay`` updates later, into their gradients."""
    result: list[Any] = [parameter.grad for parameter in parameters]
    if not is_muon(optimizer):
        beta1, beta2 = group["betas"]
        states = [optimizer.state[parameter] for parameter in parameters]
        # By parameter in PyTorch's Adam, by group in Transformer Engine's; on a device or not.
        steps = [_on_host(state.get("step", group.get("step"))) for state in states]
        torch._foreach_copy_(result, [state["exp_avg_sq"] for state in states])
        torch._foreach_sqrt_(result)
        torch._foreach_div_(result, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(result, group["eps"])
        torch._foreach_mul_(result, [1 - beta1**step for step in steps])
        torch._foreach_reciprocal_(result)
        torch._foreach_mul_(result, [state["exp_avg"] for state in states])
    torch._foreach_mul_(result, -delay * group["lr"])
    torch._foreach_add_(result, [parameter.data for parameter in parameters])


def _on_host(step: Any) -> Any:
    """A number where that needs no wait for a device."""
    return step.item() if isinstance(step, torch.Tensor) and step.device.type == "cpu" else step
