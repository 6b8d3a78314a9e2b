"""What a look-ahead must leave in the model after each update, for ``train``'s ``within``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from .interruptions import Injection

OVERFLOW = Injection(stage=1, microbatch=7, factor=math.inf, backward=True)
"""Of a gradient, in the fourth update of two micro-batches."""


@contextlib.contextmanager
def weights_compared() -> Iterator[None]:
    """Inside, an update that leaves in the model other weights than it should fails.

    They are to be those of the main parameters, bit for bit, at a drain, after a skipped update and on a stage without
    drift, and others after any other update.
    """
    from paci_megatron.runtime.update import StageUpdate

    apply = StageUpdate.apply

    def compared_apply(self: Any, update: int) -> Any:
        result = apply(self, update)
        parameters = [parameter for parameter in self._parameters if hasattr(parameter, "main_param")]
        assert parameters
        are_main = all(torch.equal(parameter, parameter.main_param.to(parameter.dtype)) for parameter in parameters)
        expected = self._control.is_drained(update) or not result.successful or self._delay == 0
        assert are_main == expected, f"update {update} of the stage with a delay of {self._delay}"
        return result

    StageUpdate.apply = compared_apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        StageUpdate.apply = apply  # type: ignore[method-assign]


@contextlib.contextmanager
def weights_compared_and_one_skipped() -> Iterator[None]:
    """:func:`weights_compared`, and :data:`OVERFLOW` happens."""
    with weights_compared(), OVERFLOW():
        yield
