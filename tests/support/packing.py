"""Packed sequences without Transformer Engine, for ``train``'s ``within``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def attention_within_sequences(folder: str) -> Iterator[None]:
    """Attention that takes packed sequences, which Megatron has in Transformer Engine only.

    What Megatron is told of their lengths after each iteration, [tokens, squares], is written to one JSON file a rank in
    ``folder``.
    """
    import megatron.training.training as training
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    attend, consume = DotProductAttention.forward, training.consume_seqlen_stats_in_iteration
    lengths: list[tuple[float, float]] = []
    training._seqlen_stats_in_iteration = None  # the evaluations of a run before

    def forward(
        self: Any, query: Any, key: Any, value: Any, mask: Any, *others: Any, packed_seq_params: Any = None, **named: Any
    ) -> Any:
        if packed_seq_params is None:
            return attend(self, query, key, value, mask, *others, **named)
        begins, place = packed_seq_params.cu_seqlens_q, torch.arange(query.shape[0])
        assert begins[0] == 0 and begins[-1] == query.shape[0]
        assert packed_seq_params.max_seqlen_q == (begins[1:] - begins[:-1]).max()
        sequence = torch.bucketize(place, begins, right=True)
        hidden = (place[None, :] > place[:, None]) | (sequence[None, :] != sequence[:, None])
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))  # (tokens, 1, heads, channels)
        return attend(self, query, key, value, hidden[None, None], *others, **named)

    def recorded() -> Any:
        lengths.append(consume())
        return lengths[-1]

    DotProductAttention.forward, training.consume_seqlen_stats_in_iteration = forward, recorded
    try:
        yield
    finally:
        DotProductAttention.forward, training.consume_seqlen_stats_in_iteration = attend, consume
        Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(lengths), encoding="utf-8")
