"""Which tokens the model reads at once, and which of its predictions count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """One pass of the model: it reads tokens ``[begin, end)`` of a stream and predicts tokens ``[begin + 1, end + 1)``.

    Of its ``end - begin`` predictions those from ``first_scored`` on count; the tokens before are their context.
    """

    stream: int
    begin: int
    end: int
    first_scored: int

    @property
    def length(self) -> int:
        """The number of tokens that are read, and of predictions made."""
        return self.end - self.begin

    @property
    def num_scored(self) -> int:
        """The number of predictions that count."""
        return self.length - self.first_scored


def sliding_windows(stream: int, num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most ``context`` tokens over a stream, each ``stride`` after the one before, 1 <= stride <= context.

    Every token but the first, which nothing predicts, is scored once: all that the first window predicts, then the last
    ``stride`` predictions of each (fewer in the last window). So a scored token sees at least ``context - stride + 1``
    tokens before it, or all there are. ``stride == context`` does not overlap; ``stride == 1`` is token by token.
    """
    last = num_tokens - 1
    scored_to = 0
    for begin in range(0, last, stride):
        end = min(begin + context, last)
        yield Window(stream, begin, end, scored_to - begin)
        scored_to = end
        if end == last:
            return


def ending_window(stream: int, num_tokens: int, num_scored: int, context: int) -> Window:
    """The window that scores the last ``num_scored`` tokens of a stream, 1 <= num_scored <= context, in the longest
    context that fits.
    """
    end = num_tokens - 1
    begin = max(0, end - context)
    return Window(stream, begin, end, end - begin - num_scored)


class Batch(NamedTuple):
    """A micro-batch: ``tokens``, ``labels`` (int64) and ``scored`` (bool), each (rows, length), and each row's window.

    Rows are filled up with zeros on the right, which causal attention does not see, and a row without a window is -1.
    """

    tokens: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    windows: list[int]


def make_batch(
    streams: Sequence[np.ndarray], windows: Sequence[Window], chosen: Sequence[int], rows: int, length: int
) -> Batch:
    """The windows with the indices ``chosen``, at most ``rows``, as a batch of exactly that many rows of ``length``."""
    tokens, labels = np.zeros((2, rows, length), dtype=np.int64)
    scored = np.zeros((rows, length), dtype=bool)
    for row, index in enumerate(chosen):
        window = windows[index]
        stream = streams[window.stream]
        tokens[row, : window.length] = stream[window.begin : window.end]
        labels[row, : window.length] = stream[window.begin + 1 : window.end + 1]
        scored[row, window.first_scored : window.length] = True
    return Batch(tokens, labels, scored, [*chosen, *[-1] * (rows - len(chosen))])
