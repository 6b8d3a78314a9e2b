"""Text to Megatron's `.bin/.idx`. Importing this package imports nothing heavy."""

from __future__ import annotations


class DataError(ValueError):
    """A corpus, tokenizer or output that cannot work; the message has value, constraint and remedy."""
