"""Checks of the files a training command names, before any process group or model is built."""

from __future__ import annotations

import argparse
import contextlib
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from paci_megatron.config import ConfigError


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a :class:`ConfigError` into one line, printed by the first rank, and exit status 2 on every rank."""
    try:
        yield
    except ConfigError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"paci-megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def check_inputs(args: argparse.Namespace) -> None:
    """``ConfigError`` if a tokenizer file is missing, or a data file is missing, corrupt or empty."""

    def given(name: str) -> Any:
        return getattr(args, name, None)  # a YAML configuration may lack any of them

    for flag, path in (
        ("--tokenizer-model", given("tokenizer_model")),
        ("--vocab-file", given("vocab_file")),
        ("--merge-file", given("merge_file")),
    ):
        # A Hugging Face tokenizer may be a name on the hub.
        local = path is not None and "://" not in path and given("tokenizer_type") != "HuggingFaceTokenizer"
        if local and not Path(path).exists():
            raise ConfigError(f"{flag} {path}: no such file. Give the tokenizer the data was preprocessed with.")
    if given("mock_data"):
        return
    prefixes = [
        prefix
        for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
        for prefix in _prefixes(given(flag) or ())
    ]
    if not prefixes and given("data_args_path") is None and given("per_split_data_args_path") is None:
        raise ConfigError(
            "no training data: give --data-path PREFIX (the path of a .bin and .idx file without its ending, as "
            "tools/preprocess_data.py writes them), or --mock-data."
        )
    for prefix in prefixes:
        _check_indexed_dataset(prefix)


def _prefixes(words: Iterable[str]) -> Iterator[str]:
    """The data prefixes in a blend, which may have a weight before each."""
    for word in words:
        try:
            float(word)
        except ValueError:
            yield word


_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, number of sequences, number of document boundaries


def _check_indexed_dataset(prefix: str) -> None:
    """``ConfigError`` unless ``prefix``.bin and .idx look like Megatron's IndexedDataset with something in it."""
    if "://" in prefix:
        return  # object storage: Megatron fetches the index itself
    index, data = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (index, data):
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file. --data-path takes the path without .bin or .idx; tools/preprocess_data.py prints it."
            )
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ConfigError(f"{index} is not an index of Megatron's IndexedDataset. Run tools/preprocess_data.py again.")
    sequences = _HEADER.unpack(header)[3]
    if sequences == 0 or data.stat().st_size == 0:
        raise ConfigError(f"{prefix}: no document in it. Preprocess a corpus that has text.")
