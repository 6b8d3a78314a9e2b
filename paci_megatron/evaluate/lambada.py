"""LAMBADA: the last word of a passage, predicted from all before it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from paci_megatron.data import DataError
from paci_megatron.data.corpus import Document
from paci_megatron.data.encoding import token_ids

from .windows import Window, ending_window

_LAST_WORD = re.compile(r"\s+\S+\s*$")


class Examples(NamedTuple):
    """The passages as token ids, a window each whose scored tokens are its last word, and the words' UTF-8 bytes in all."""

    streams: list[np.ndarray]
    windows: list[Window]
    num_bytes: int


def last_words(documents: Iterable[Document], tokenizer: Any, num_ids: int, context: int) -> Examples:
    """An example of each document; the word's tokens are those in which the text differs from the text before the word.

    The model has ``num_ids`` token ids. A passage longer than ``context`` keeps its end. ``DataError`` for a passage of one
    word, or a word beyond ``context``.
    """
    streams: list[np.ndarray] = []
    windows: list[Window] = []
    num_bytes = 0
    for text, origin, _ in documents:
        word = _LAST_WORD.search(text)
        before = token_ids(tokenizer, text[: word.start()], origin, num_ids) if word else []
        ids = token_ids(tokenizer, text.rstrip(), origin, num_ids)
        if ids and ids[-1] == tokenizer.eod:
            ids.pop()  # some tokenizers end every text with it
        shared = _common_length(before, ids)
        if not word or not shared or shared == len(ids):
            raise DataError(f"{origin}: one word, which has no context to predict it from; remove the line")
        if len(ids) - shared > context:
            message = f"a last word of {len(ids) - shared} tokens in a context of {context}; remove the line"
            raise DataError(f"{origin}: {message}, or give a longer --seq-length")
        windows.append(ending_window(len(streams), len(ids), len(ids) - shared, context))
        streams.append(np.array(ids, dtype=np.int64))
        num_bytes += len(word[0].rstrip().encode())
    return Examples(streams, windows, num_bytes)


def _common_length(left: list[int], right: list[int]) -> int:
    """How many ids two lists have in common at their start."""
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
