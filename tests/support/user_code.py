"""What users' scripts do around Megatron, for ``train``'s ``within``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


@contextlib.contextmanager
def data_at_every_stage() -> Iterator[None]:
    """Every stage is given data, and reads a batch in each forward, as some scripts do to prepare masks."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    import pretrain_gpt_paci as script

    forward_step, init = script.forward_step, BlendedMegatronDatasetBuilder.__init__

    def reading_forward_step(data_iterator: Any, model: Any, *others: Any) -> Any:
        if not parallel_state.is_pipeline_first_stage() and not parallel_state.is_pipeline_last_stage():
            next(data_iterator)
        return forward_step(data_iterator, model, *others)

    def built_everywhere(self: Any, cls: Any, sizes: Any, is_built_on_rank: Any, config: Any) -> None:
        init(self, cls, sizes, lambda: True, config)

    script.forward_step = reading_forward_step  # type: ignore[assignment]
    BlendedMegatronDatasetBuilder.__init__ = built_everywhere
    try:
        yield
    finally:
        script.forward_step, BlendedMegatronDatasetBuilder.__init__ = forward_step, init


@contextlib.contextmanager
def wrapped_optimizer_step(folder: str, by_class: bool) -> Iterator[None]:
    """Count the calls of a wrapper around ``optimizer.step``, put on the optimizer that Megatron returns or on its class,
    how many of them found other weights behind the step than before it, and the most functions between Megatron's ``train``
    and the step; one JSON file a rank in ``folder``.
    """
    import megatron.training.training as training
    import torch.distributed as dist
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    counts = {"steps": 0, "changed": 0, "frames": 0}
    setup, class_step = training.setup_model_and_optimizer, ChainedOptimizer.step
    models: list[Any] = []

    def fingerprint() -> float:
        return sum(float(parameter.detach().double().sum()) for model in models for parameter in model.parameters())

    def counted(step: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            frames = 0
            while frame is not None and frame.f_code.co_name != "train":
                frame, frames = frame.f_back, frames + 1
            counts["frames"] = max(counts["frames"], frames)
            before = fingerprint()
            returned = step(*args)
            counts["steps"] += 1
            counts["changed"] += fingerprint() != before
            return returned

        return wrapper

    def wrapping_setup(*args: Any, **named: Any) -> Any:
        model, optimizer, scheduler = setup(*args, **named)
        models.extend(model)
        if not by_class:
            optimizer.step = counted(optimizer.step)
        return model, optimizer, scheduler

    training.setup_model_and_optimizer = wrapping_setup
    if by_class:
        ChainedOptimizer.step = counted(class_step)
    try:
        yield
    finally:
        training.setup_model_and_optimizer, ChainedOptimizer.step = setup, class_step
        Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(counts), encoding="utf-8")
