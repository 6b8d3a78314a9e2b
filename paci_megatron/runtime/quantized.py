"""The quantised weights (fp8, fp4) that Transformer Engine keeps beside the parameters."""

from __future__ import annotations

from typing import Any

import torch


class QuantizedCopies:
    """Keeps Transformer Engine's quantised copies those of the newest weights.

    A module quantises its weight in a forward that Megatron calls the first of a window, and reads that copy in all other
    forwards and backwards. Under a flush no update comes in between. Calling another forward the first is no way out: its
    backward would overwrite the window's gradients instead of adding to them. With quantised parameters
    (``--fp8-param-gather``) there are no copies, and the optimizer's step itself quantises.
    """

    def __init__(self, model: Any) -> None:
        self._modules = [module for module in model.modules() if isinstance(getattr(module, _COPIES, None), dict)]

    def exist(self) -> bool:
        """Whether any weight has a copy now."""
        return any(getattr(module, _COPIES) for module in self._modules)

    @torch.no_grad()
    def renew(self) -> None:
        """Quantise the weights again, into the copies that there are: backwards in flight hold the same, and see it.

        A copy that cannot be written again, such as one of several experts' weights together, is dropped: the next forward
        makes another, and backwards in flight keep that of their forward.
        """
        for module in self._modules:
            copies = getattr(module, _COPIES)
            for name, copy in list(copies.items()):
                weight = getattr(module, name, None)
                if isinstance(weight, torch.Tensor) and hasattr(copy, "quantize_"):
                    copy.quantize_(weight)
                else:
                    del copies[name]


_COPIES = "_fp8_workspaces"
"""The attribute of Transformer Engine's modules: quantised tensors by the name of the parameter."""
