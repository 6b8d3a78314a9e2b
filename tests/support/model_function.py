"""A model from a function of the script's, in place of Megatron's builder for what the command line describes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def from_a_function() -> Iterator[None]:
    """Inside, models are built so; for ``train``'s ``within``.

    In Megatron 0.19 only they get the layer-wise optimizer's buffer of parameters, and beside it the distributed optimizer
    for what is no matrix.
    """
    import megatron.training.training as training

    original = training.setup_model_and_optimizer

    def setup_model_and_optimizer(*positional: Any, cfg_container: Any, model_provider_func: None, **named: Any) -> Any:
        description, cfg_container.model = cfg_container.model, None

        def model_provider(pre_process: bool, post_process: bool, pg_collection: Any, **others: Any) -> Any:
            return description.get_builder_cls()(description).build_model(pg_collection, pre_process, post_process)

        return original(*positional, cfg_container=cfg_container, model_provider_func=model_provider, **named)

    training.setup_model_and_optimizer = setup_model_and_optimizer
    yield
    training.setup_model_and_optimizer = original
