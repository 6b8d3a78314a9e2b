"""Megatron's `.bin/.idx` and the indices it caches, looked at before anything is built: are they whole, what is in them?"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paci_megatron.data import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, number of sequences, number of document boundaries
# By the number that Megatron's index has for each.
_TOKEN_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}
_BLOCK_TOKENS = 1 << 20


class Index(NamedTuple):
    """What the `.idx` of `prefix` says: the number of tokens of each sequence, and how the `.bin` holds a token.

    Megatron's GPT data sets are split by sequence; `paci-megatron preprocess` makes one of each document.
    """

    prefix: str
    lengths: np.ndarray
    dtype: np.dtype


def is_remote(prefix: str) -> bool:
    """Whether this is in an object storage, from which Megatron fetches the index itself."""
    return "://" in prefix


def open_index(prefix: str) -> Index:
    """The index of `prefix`; `DataError` unless the `.idx` and the `.bin` are whole and have a document."""
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index, data):
        if not path.is_file():
            remedy = "--data-path takes the path without .bin or .idx; paci-megatron preprocess prints it."
            raise DataError(f"{path}: no such file. {remedy}")
    try:
        with open(index, "rb") as file:
            header = file.read(_HEADER.size)
        size, data_size = index.stat().st_size, data.stat().st_size
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror}. Check its permissions.") from error
    version, kind, sequences, documents = _HEADER.unpack(header)[1:] if len(header) == _HEADER.size else (0, 0, 0, 0)
    if not header.startswith(_MAGIC) or version != 1 or kind not in _TOKEN_TYPES:
        raise DataError(f"{index} is not an index of Megatron's IndexedDataset. Run paci-megatron preprocess again.")
    if sequences == 0 or data_size == 0:
        raise DataError(f"{prefix}: no document in it. Preprocess a corpus that has text.")
    # Length and place of each sequence, then where each document begins.
    if size < (needed := _HEADER.size + 12 * sequences + 8 * documents):
        raise DataError(f"{index}: {size} bytes, and it needs {needed}, so it was cut short. Copy or preprocess it again.")
    lengths = np.memmap(index, np.int32, "r", _HEADER.size, (sequences,))
    places = np.memmap(index, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    dtype = np.dtype(_TOKEN_TYPES[kind])
    needed = int(places[-1]) + int(lengths[-1]) * dtype.itemsize
    if data_size < needed:
        raise DataError(f"{data}: {data_size} bytes, and {index.name} needs {needed}. Copy or preprocess it again.")
    return Index(prefix, lengths, dtype)


def largest_id(index: Index, max_tokens: int) -> int:
    """The largest token id among all tokens, or among at most `max_tokens` in blocks spread evenly over them."""
    tokens = np.memmap(index.prefix + ".bin", index.dtype, "r")
    block = min(_BLOCK_TOKENS, max_tokens)
    num_blocks = max(1, min(max_tokens // block, -(-len(tokens) // block)))
    starts = np.linspace(0, max(0, len(tokens) - block), num_blocks, dtype=np.int64)
    return max(int(tokens[start : start + block].max()) for start in starts.tolist())


def check_cache(prefix: str, cache: str | None) -> None:
    """`DataError` if an index that Megatron has cached for `prefix` is cut short: a copy, or a full disk, can do that."""
    for path in _cached_arrays(Path(cache) if cache else Path(prefix, "cache", "GPTDataset_indices")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            remedy = "Delete it, and Megatron builds it again"
            raise DataError(f"{path}: a cached index that cannot be read, as if cut short. {remedy}.") from error


def _cached_arrays(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from sorted(Path(entry.path) for entry in entries if entry.name.endswith("_index.npy"))
