"""Megatron's ``--qk-clip`` and ``--log-max-attention-logit`` on a CPU, for ``train``'s ``within``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def attention_logits() -> Iterator[None]:
    """Inside, Megatron's own attention keeps the largest logit of each head, as Transformer Engine's does; (heads,)."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.training import arguments

    forward, is_te_min_version = DotProductAttention.forward, arguments.is_te_min_version

    def keeping_forward(self: Any, query: torch.Tensor, key: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        largest = (
            torch.einsum("ibhd,jbhd->hbij", query.detach(), key.detach()).flatten(1).amax(dim=1) / query.shape[-1] ** 0.5
        )
        known = self.current_max_attn_logits
        self.current_max_attn_logits = largest if known is None else torch.maximum(known, largest)
        return forward(self, query, key, *others, **named)

    DotProductAttention.forward, DotProductAttention.current_max_attn_logits = keeping_forward, None
    arguments.is_te_min_version = lambda *version, **named: version == ("2.9.0",) or is_te_min_version(*version, **named)
    try:
        yield
    finally:
        DotProductAttention.forward, arguments.is_te_min_version = forward, is_te_min_version
        del DotProductAttention.current_max_attn_logits
