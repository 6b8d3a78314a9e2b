"""Megatron's distributed optimizer around PyTorch's Adam, when it loads a ``torch_dist`` checkpoint.

Megatron expects the Adam of Transformer Engine or Apex, which counts steps by parameter group. PyTorch's, which it falls
back to, counts them by parameter, and only from its first update on. Left alone, loading fails; past that failure each
update would count as many steps as there are parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def wrap_sharded_state_dict(original: Function) -> Function:
    """Wrap ``DistributedOptimizer.sharded_state_dict``, which reads a step count even to load one."""

    @functools.wraps(original)
    def sharded_state_dict(
        self: Any, model_sharded_state_dict: Any, is_loading: bool = False, *positional: Any, **named: Any
    ) -> Any:
        adam = self.optimizer
        if not is_loading or not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            return original(self, model_sharded_state_dict, is_loading, *positional, **named)
        if not adam.state:
            self.init_state_fn(adam, self.config)
            for state in adam.state.values():
                state["step"] = torch.tensor(0.0)
        state_dict = original(self, model_sharded_state_dict, is_loading, *positional, **named)
        # It has made all counts one tensor, and while another stage of the process is loaded nobody would mend that here.
        for state in adam.state.values():
            state["step"] = state["step"].clone()
        return state_dict

    return sharded_state_dict


def wrap_set_main_param_and_optimizer_states(original: Function) -> Function:
    """Wrap ``DistributedOptimizer._set_main_param_and_optimizer_states``, which copies a parameter's state from a
    checkpoint.

    The step count is not part of it: Megatron has set that before, to one tensor for all parameters. And autograd refuses
    copies into fp32 parameters, which are views.
    """

    @functools.wraps(original)
    def _set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None)
        with torch.no_grad():
            original(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    return _set_main_param_and_optimizer_states
