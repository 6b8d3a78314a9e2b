"""The figures of an evaluation, for programs and for people."""

from __future__ import annotations

import math
from typing import Any

from . import EvaluationError


def perplexity(nll: float, count: int | None) -> float | None:
    """``exp(nll / count)``; None if the count is unknown or 0, or the result is beyond a float."""
    if not count or nll / count > 700:
        return None
    return math.exp(nll / count)


def figures(nll: float, num_tokens: int, num_words: int | None, num_bytes: int | None) -> dict[str, Any]:
    """The common figures. ``nll`` is the sum over the ``num_tokens`` scored tokens, in nats; what is unknown is None.

    ``EvaluationError`` if the sum is not finite.
    """
    if not math.isfinite(nll):
        raise EvaluationError(
            f"the loss over the {num_tokens} scored tokens is {nll}: the checkpoint's weights are not finite, or "
            "overflow in bf16; evaluate an earlier iteration with --ckpt-step, or without --bf16"
        )
    return {
        "num_tokens": num_tokens,
        "num_words": num_words,
        "num_bytes": num_bytes,
        "token_ppl": perplexity(nll, num_tokens),
        "word_ppl": perplexity(nll, num_words),
        "bits_per_byte": nll / math.log(2) / num_bytes if num_bytes else None,
        "nll": nll,
    }


_ROWS = (
    ("token perplexity", "token_ppl", "{:,.4f}"),
    ("word perplexity", "word_ppl", "{:,.4f}"),
    ("bits per byte", "bits_per_byte", "{:.5f}"),
    ("last-word accuracy", "accuracy", "{:.2%}"),
    ("last-word perplexity", "last_word_ppl", "{:,.4f}"),
    ("loss per token (nats)", "loss_per_token", "{:.6f}"),
    ("tokens scored", "num_tokens", "{:,}"),
    ("tokens of the text", "num_text_tokens", "{:,}"),
    ("words", "num_words", "{:,}"),
    ("bytes", "num_bytes", "{:,}"),
    ("documents", "num_documents", "{:,}"),
    ("context / stride", "protocol", "{}"),
    ("checkpoint iteration", "iteration", "{:,}"),
    ("seconds", "seconds", "{:.1f}"),
)


def table(result: dict[str, Any]) -> str:
    """A line for each figure there is; a dash for what is unknown."""
    stride = result.get("stride")
    shown = {
        **result,
        "loss_per_token": result["nll"] / result["num_tokens"],
        "protocol": f"{result['context']:,} / {'-' if stride is None else f'{stride:,}'}",
    }
    if "accuracy" in shown:
        del shown["word_ppl"]  # it is the last-word perplexity
    lines = []
    for label, key, form in _ROWS:
        if key in shown:
            value = shown[key]
            lines.append(f"{label:24}{'-' if value is None else form.format(value):>16}")
    if result.get("read"):
        lines.append(f"read: {result['read']}")
    return "\n".join(lines)
