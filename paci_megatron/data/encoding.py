"""Documents to token ids, in one process or several, in order, with a bounded amount of text under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from paci_megatron.data import DataError
from paci_megatron.data.corpus import Document
from paci_megatron.data.tokenizers import quiet_imports

# Large enough that sending a chunk to a worker costs little beside tokenizing it.
CHUNK_BYTES = 1 << 20


class Encoded(NamedTuple):
    """One chunk: all its ids, and for each document the number of ids, of words and of UTF-8 bytes."""

    ids: np.ndarray
    lengths: list[int]
    words: list[int]
    num_bytes: list[int]


class Encoder:
    """Tokenizes chunks. `eod`, unless None, ends each document; one without characters has no ids."""

    def __init__(self, tokenizer: Any, eod: int | None) -> None:
        with quiet_imports():
            from megatron.core.datasets.indexed_dataset import DType

        self.tokenizer = tokenizer
        self.eod = eod
        self.num_ids = int(tokenizer.vocab_size)
        self.dtype = DType.optimal_dtype(self.num_ids)

    def __call__(self, chunk: list[Document]) -> Encoded:
        """The ids of a chunk of at least one document; DataError if one cannot be tokenized."""
        ids = [np.array(self._encode(document), dtype=self.dtype) for document in chunk]
        return Encoded(
            np.concatenate(ids),
            [len(array) for array in ids],
            [len(document.text.split()) for document in chunk],
            [document.num_bytes for document in chunk],
        )

    def _encode(self, document: Document) -> list[int]:
        ids = token_ids(self.tokenizer, document.text, document.origin, self.num_ids)
        # Some Hugging Face tokenizers end every text with this token by themselves.
        if ids and self.eod is not None and ids[-1] != self.eod:
            ids.append(self.eod)
        return ids


def token_ids(tokenizer: Any, text: str, origin: str, num_ids: int) -> list[int]:
    """The ids of a text; DataError, with where it came from, if it cannot be tokenized or has ids from `num_ids` on.

    So many a model has: in training what the tokenizer says, its `vocab_size`, in an evaluation what the checkpoint has.
    """
    try:
        ids: list[int] = tokenizer.tokenize(text) if text else []
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise DataError(f"{origin}: cannot be tokenized: {error}; correct the text, or use another tokenizer") from error
    if ids and not 0 <= min(ids) <= max(ids) < num_ids:
        wrong = max(ids) if min(ids) >= 0 else min(ids)
        remedy = "use another tokenizer, or correct its files"
        raise DataError(f"{origin}: token id {wrong} is outside the vocabulary of {num_ids}; {remedy}")
    return ids


def chunked(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of at least CHUNK_BYTES of text, but for the last; reads no further than the list it yields."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        # One more per document, so that a corpus of empty documents is not one chunk.
        size += document.num_bytes + 1
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_in_order(chunks: Iterable[list[Document]], encoder: Encoder, workers: int) -> Iterator[Encoded]:
    """Every chunk encoded, in order; never more than two per worker and one under way.

    With one worker it is this process. DataError if a worker dies.
    """
    if workers == 1:
        yield from map(encoder, chunks)
        return
    # A forked worker has the tokenizer at once. Where fork is not safe, a worker imports Megatron again.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (encoder,)) as pool:
        try:
            # Fork before the first chunk is read: a reader's library may start threads, which a fork breaks.
            pool.submit(_ready).result()
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            message = f"--workers {workers}: one of them was killed, most often for lack of memory; use fewer"
            raise DataError(message) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    # Ctrl-C reaches the whole group; the parent is the one that reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A parent that is killed cannot stop its workers, which would wait for another chunk for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ready() -> None:
    pass


def _encode_in_worker(chunk: list[Document]) -> Encoded:
    assert _encoder is not None
    return _encoder(chunk)
