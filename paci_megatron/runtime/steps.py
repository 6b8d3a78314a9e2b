"""The steps of a stage's optimizer, of which some are skipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch


def parts_of(optimizer: Any) -> list[Any]:
    """The optimizers that a Megatron optimizer chains, itself if none. The layer-wise one can be a chain in a chain."""
    chained = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if chained is None else [part for link in chained for part in parts_of(link)]


class OptimizerSteps:
    """Says what of a stage's optimizer an update steps: all of it, or in a skipped one nothing but the tied embedding.

    That is stepped when the other stage that holds it does, which may not skip: the two must not differ.
    PyTorch's Adam counts steps by parameter. Those of Transformer Engine and Apex count them by parameter group, also for
    parameters without a gradient; so after a skipped update the tied embedding has a count of its own here, and is stepped
    apart from then on. One object serves all plans of a stage.
    """

    def __init__(self, optimizer: Any) -> None:
        """``optimizer`` is Megatron's."""
        self._optimizer = optimizer
        self._groups = [group for part in parts_of(optimizer) for group in part.param_groups]
        self._tied_ahead = 0  # steps of the tied embedding more than of its group
        self._counts_by_group = False
        # Then a step gathers the new weights in the gradients' memory, and leaves no gradients for a second step.
        config = getattr(optimizer, "config", None)
        self._overwrites_gradients = getattr(config, "reuse_grad_buf_for_mxfp8_param_ag", False)

    def due(
        self, applies: bool, tied: torch.nn.Parameter | None, tied_applies: bool = True
    ) -> Iterator[AbstractContextManager[None]]:
        """The optimizer's steps that make up an update, each a context in which to call its ``step``.

        ``applies`` is whether the update is not skipped; ``tied`` the embedding, if it is here, and ``tied_applies`` whether
        that is stepped.
        """
        if tied is None or (applies == tied_applies and not self._tied_ahead):
            if applies:
                yield contextlib.nullcontext()
            return
        others: list[torch.Tensor] = []
        tied_parts: list[torch.Tensor] = []
        for parameter in self._optimizer.get_parameters():
            (tied_parts if is_part_of(parameter, tied) else others).append(parameter)
        if tied_applies:
            yield self._tied_alone(others, keeps_gradients=applies and self._overwrites_gradients)
        if applies:
            yield _without_gradients(tied_parts)
        self._tied_ahead += tied_applies - applies

    @contextlib.contextmanager
    def _tied_alone(self, others: Iterable[torch.Tensor], keeps_gradients: bool) -> Iterator[None]:
        with _without_gradients(others, as_copies=keeps_gradients), self._tied_count():
            yield

    @contextlib.contextmanager
    def _tied_count(self) -> Iterator[None]:
        """Inside, the groups count steps as the tied embedding does; afterwards as they did before."""
        counts = [group.get("step") for group in self._groups]
        counts = [count.clone() if isinstance(count, torch.Tensor) else count for count in counts]
        if self._counts_by_group and self._tied_ahead:
            for group, count in zip(self._groups, counts, strict=True):
                group["step"] = (count or 0) + self._tied_ahead
        try:
            yield
        finally:
            for group, count in zip(self._groups, counts, strict=True):
                self._counts_by_group |= "step" in group
                if count is not None:
                    group["step"] = count
                else:
                    group.pop("step", None)


@contextlib.contextmanager
def _without_gradients(parameters: Iterable[torch.Tensor], as_copies: bool = False) -> Iterator[None]:
    """Inside, an optimizer finds no gradients at ``parameters``, in either place where Megatron puts them.

    Afterwards they are there again, ``as_copies`` made before.
    """
    kept = [
        (parameter, name, gradient.clone() if as_copies else gradient)
        for parameter in parameters
        for name in ("grad", "decoupled_grad")
        if (gradient := getattr(parameter, name, None)) is not None
    ]
    for parameter, name, _ in kept:
        setattr(parameter, name, None)
    try:
        yield
    finally:
        for parameter, name, gradient in kept:
            setattr(parameter, name, gradient)


def is_part_of(parameter: torch.Tensor, weight: torch.nn.Parameter) -> bool:
    """Whether ``parameter``, one of an optimizer's, is ``weight``, a shard of it, or its copy in fp32."""
    begin = weight.data_ptr()
    return parameter is getattr(weight, "main_param", None) or begin <= parameter.data_ptr() < begin + weight.nbytes
