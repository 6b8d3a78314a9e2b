"""The data of a training command are checked before anything is built: blends, splits, indices, token ids."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from paci_megatron.data import DataError, training_data
from paci_megatron.data import indexed as indexed_files
from paci_megatron.data.indexed import largest_id, open_index
from paci_megatron.data.training_data import SPLITS, bounds, check_token_ids, check_training_files, fitting_split


def namespace(**changes: Any) -> argparse.Namespace:
    """No files named, no mock data, and evaluations as by Megatron's default."""
    names = ("tokenizer_model", "vocab_file", "merge_file", "data_path", "train_data_path", "valid_data_path", "split")
    more = ("test_data_path", "data_args_path", "per_split_data_args_path", "data_cache_path")
    nothing = {"tokenizer_type": "GPT2BPETokenizer", "mock_data": False, **dict.fromkeys((*names, *more))}
    return argparse.Namespace(**{**nothing, "eval_iters": 100, "seq_length": 8, "skip_train": False, **changes})


def indexed(prefix: Path, lengths: Sequence[int]) -> str:
    """A `.bin/.idx` with documents of these lengths, the ids of each from 0 on."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `many` (1,000 documents), `few` (20), `one`, `blank` (its last document has no token), `short`."""
    monkeypatch.chdir(tmp_path)
    for name, lengths in {
        "many": [10] * 1000,
        "few": [10] * 20,
        "one": [500],
        "blank": [10] * 19 + [0],
        "short": [3] * 20,
    }.items():
        indexed(tmp_path / name, lengths)
    return tmp_path


GOOD: dict[str, dict[str, Any]] = {
    "default split": {"data_path": ["many"]},
    "weights": {"data_path": ["0.3", "few", "0.7", "many"], "split": "9,1,0"},
    "no weights": {"data_path": ["few", "many"], "split": "9, 1"},
    "three prefixes": {"data_path": ["few", "many", "many"], "split": "90,5,5"},
    "no evaluations": {"data_path": ["one"], "split": "1,0,0", "eval_iters": 0},
    "only evaluations": {"data_path": ["one"], "split": "0,1,0", "skip_train": True},
    "per split": {"train_data_path": ["few"], "valid_data_path": ["1", "one"]},
    "mock": {"mock_data": True},
    "hub": {"mock_data": True, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "org/name"},
    "elsewhere": {"data_path": ["s3://bucket/corpus"]},
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("changes", GOOD.values(), ids=list(GOOD))
def test_good_data_pass(changes: dict[str, Any]) -> None:
    check_training_files(namespace(**changes))


DEFAULT = "--split 969,30,1, which is the default: "
BAD: dict[str, tuple[dict[str, Any], str]] = {
    # Splits without a document, which Megatron would look for for ever
    "default": ({"data_path": ["few"]}, DEFAULT + "leaves test without a document of the 20 in few. Give --split 969,30,0."),
    "default, one": (
        {"data_path": ["one"]},
        "leaves valid without a document of the 1 in one. One document cannot be split",
    ),
    "tiny share": ({"data_path": ["few"], "split": "99,1,0"}, "leaves valid without a document.* Give --split 19,1,0."),
    "in one of two": (
        {"data_path": ["1", "many", "1", "few"], "split": "98,1,1"},
        "valid without .*few. Give --split 19,1,0.",
    ),
    "without evaluations": (
        {"data_path": ["few"], "eval_iters": 0},
        DEFAULT + "leaves test without a document of the 20 in few. Give --split 969,0,0.",
    ),
    "no token": ({"data_path": ["blank"], "split": "19,1,0"}, "leaves valid without a token of the 20 in blank"),
    "no sample": (
        {"data_path": ["many", "short"], "split": "9,1,0"},
        "leaves valid 6 tokens, and without weights .* takes 9",
    ),
    # Splits that are missing
    "no valid": ({"data_path": ["many"], "split": "100,0,0"}, "no data for the evaluations .* Give --split 999,1,0."),
    "no train": ({"data_path": ["few"], "split": "0,100,0"}, "there are no data to train on. Give --split 19,1,0."),
    "only test": ({"data_path": ["few"], "split": "0,0,1", "eval_iters": 0}, "no data to train on. Give --split 1,0,0"),
    "no valid path": (
        {"train_data_path": ["few"]},
        "no data for the evaluations .* Give --valid-data-path, or --eval-iters 0",
    ),
    "no train path": ({"valid_data_path": ["few"]}, "no data to train on. Give --train-data-path"),
    "split beside paths": ({"train_data_path": ["few"], "split": "9,1,0"}, "--split 9,1,0: .* Remove --split"),
    # Splits that are no splits
    "negative": ({"data_path": ["few"], "split": "-1,2,3"}, "--split -1,2,3: not up to three numbers"),
    "exponent": ({"data_path": ["few"], "split": "1e2,1,1"}, "--split 1e2,1,1: not up to three numbers"),
    "four": ({"data_path": ["few"], "split": "1,1,1,1"}, "--split 1,1,1,1: not up to three numbers"),
    "word": ({"data_path": ["few"], "split": "most"}, "--split most: not up to three numbers"),
    "empty": ({"data_path": ["few"], "split": ""}, "--split : not up to three numbers"),
    "zeros": ({"data_path": ["few"], "split": "0,0,0"}, "--split 0,0,0: nothing is left of the data"),
    # Blends
    "weight 0": ({"data_path": ["1", "few", "0", "many"]}, "the weight 0 must be a number above 0"),
    "negative weight": ({"data_path": ["1", "few", "-1", "many"]}, "the weight -1 must be a number above 0"),
    "weight nan": ({"data_path": ["nan", "few"]}, "the weight nan must be a number above 0"),
    "weight inf": ({"data_path": ["inf", "few"]}, "the weight inf must be a number above 0"),
    "odd": ({"data_path": ["1", "few", "2"]}, "--data-path 1 few 2: weights and prefixes do not take turns"),
    "swapped": ({"data_path": ["few", "1", "many", "2"]}, "do not take turns. Give WEIGHT PREFIX WEIGHT PREFIX"),
    "one weight": ({"data_path": ["1", "few", "many", "one"]}, "weights and prefixes do not take turns"),
    "weight alone": ({"data_path": ["1"]}, "weights and prefixes do not take turns"),
    "no word": ({"data_path": [], "train_data_path": []}, "no training data"),
    "bad per split": (
        {"train_data_path": ["0", "few"], "valid_data_path": ["few"]},
        "--train-data-path 0 few: the weight 0",
    ),
    "two sources": ({"data_path": ["few"], "train_data_path": ["few"]}, "--data-path and --train-data-path: more than one"),
    "two files": ({"data_path": ["few"], "data_args_path": "x"}, "--data-path and --data-args-path: more than one source"),
    # Files that list the data
    "no list": (
        {"data_args_path": "blend.txt", "split": "9,1,0"},
        "--data-args-path blend.txt: cannot be read: No such file",
    ),
    "folder": ({"data_args_path": ".", "split": "9,1,0"}, "--data-args-path .: cannot be read: Is a directory"),
    "list without split": ({"data_args_path": "blend.txt"}, "--data-args-path blend.txt: --split is missing"),
    "no object": ({"per_split_data_args_path": "blend.json"}, "--per-split-data-args-path blend.json: cannot be read"),
}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=list(BAD))
def test_what_cannot_work_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        check_training_files(namespace(**changes))
    assert "\n" not in str(caught.value)


LISTS: dict[str, tuple[str, str | None]] = {
    "good": ("0.5 few\n0.5 many\n", None),
    "missing": ("0.5 few 0.5 nothing", "nothing.idx: no such file"),
    "weights": ("0 few 1 many", "--data-args-path list 0 few 1 many: the weight 0 must be"),
    "nothing": ("\n", "--data-args-path list: names no data"),
    "not text": ("\udcff", "--data-args-path list: cannot be read: not UTF-8"),
}


@pytest.mark.parametrize(("text", "message"), LISTS.values(), ids=list(LISTS))
def test_a_file_that_lists_the_blend(here: Path, text: str, message: str | None) -> None:
    (here / "list").write_bytes(text.encode(errors="surrogateescape"))
    checked(namespace(data_args_path="list", split="9,1,0"), message)


PER_SPLIT: dict[str, tuple[Any, str | None]] = {
    "good": ({"train": "1 few 2 many", "valid": ["one"], "test": None}, None),
    "no test": ({"train": ["few"], "valid": ["few"]}, "has no test. Give a JSON object like"),
    "no valid": ({"train": ["few"], "valid": None, "test": None}, "no data for the evaluations"),
    "numbers": ({"train": [1, "few"], "valid": ["few"], "test": None}, "train: not a list of texts"),
    "a list": (["few"], "not a JSON object"),
    "weights": ({"train": ["-1", "few"], "valid": ["few"], "test": None}, "train -1 few: the weight -1"),
}


@pytest.mark.parametrize(("value", "message"), PER_SPLIT.values(), ids=list(PER_SPLIT))
def test_a_file_that_lists_the_splits(here: Path, value: Any, message: str | None) -> None:
    (here / "splits.json").write_text(json.dumps(value))
    checked(namespace(per_split_data_args_path="splits.json"), message)
    (here / "splits.json").write_text("{")
    checked(namespace(per_split_data_args_path="splits.json"), "splits.json: not JSON. Give a JSON object")


def checked(args: argparse.Namespace, message: str | None) -> None:
    if message is None:
        check_training_files(args)
        return
    with pytest.raises(DataError, match=message):
        check_training_files(args)


def test_splits_are_megatrons() -> None:
    for text in ("969, 30, 1", "90,5,5", "9,1", "0.8,0.2", "1,0,1", "0,0,1", "7,0,3", "33,33,33"):
        megatron = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        expected = {name: part for name, part in zip(SPLITS, megatron, strict=True) if part is not None}
        assert bounds(training_data._parse_split(text)) == expected


def test_a_fitting_split_fits_all_and_is_found_wherever_there_is_one() -> None:
    generator = random.Random(3)
    for _ in range(2000):
        counts = [generator.choice([1, 2, 3, 20, 333, 1000, 10**6]) for _ in range(generator.randint(1, 3))]
        proportions = [generator.choice([0, 1, 30, 969]) for _ in SPLITS]
        evaluates = generator.random() < 0.5
        found = fitting_split(proportions, counts, evaluates)
        assert (found is None) == (evaluates and min(counts) == 1)
        if found is None:
            continue
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(found))
        assert matrix[0] is not None and (matrix[1] is not None or not evaluates)
        for count in counts:
            assert all(round(part[1] * count) > round(part[0] * count) for part in matrix if part is not None)


@pytest.mark.parametrize("flag", ["tokenizer_model", "vocab_file", "merge_file"])
def test_missing_tokenizer_file(flag: str) -> None:
    with pytest.raises(DataError, match=rf"--{flag.replace('_', '-')} no/such.model: no such file. Give the tokenizer"):
        check_training_files(namespace(mock_data=True, **{flag: "no/such.model"}))


def test_no_data_at_all() -> None:
    with pytest.raises(DataError, match=r"no training data: give --data-path PREFIX.*or --mock-data"):
        check_training_files(namespace())


def size_of(path: Path) -> int:
    return path.stat().st_size


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".idx", None, "many.idx: no such file. --data-path takes the path without .bin or .idx"),
        (".bin", None, "many.bin: no such file. --data-path takes the path without .bin or .idx"),
        (".idx", b"", "many.idx is not an index of Megatron's IndexedDataset"),
        (".idx", b"MMIDIDX", "many.idx is not an index of Megatron's IndexedDataset"),
        (".idx", b"\x00" * 60, "many.idx is not an index of Megatron's IndexedDataset"),
        (".idx", 40, "many.idx: 40 bytes, and it needs 20042, so it was cut short"),
        (".idx", 20041, "many.idx: 20041 bytes, and it needs 20042"),
        (".bin", b"", "many: no document in it. Preprocess a corpus that has text"),
        (".bin", 19_998, "many.bin: 19998 bytes, and many.idx needs 20000"),
    ],
)
def test_files_that_are_not_whole(here: Path, ending: str, content: bytes | int | None, message: str) -> None:
    path = here / f"many{ending}"
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else whole[:content])
    for flags in ({"data_path": ["many"]}, {"train_data_path": ["few"], "valid_data_path": ["many"]}):
        checked(namespace(**flags), message)


@pytest.mark.parametrize("name", ["a-document_index.npy", "b-sample_index.npy", "c-shuffle_index.npy"])
@pytest.mark.parametrize("cache", [None, "cached"])
@pytest.mark.parametrize("keeps", [0, 20, 900])
def test_a_cached_index_that_was_cut(here: Path, cache: str | None, name: str, keeps: int) -> None:
    folder = here / (cache or "many/cache/GPTDataset_indices")
    folder.mkdir(parents=True)
    np.save(folder / name, np.arange(1000))
    args = namespace(data_path=["many"], data_cache_path=cache)
    check_training_files(args)
    (folder / name).write_bytes((folder / name).read_bytes()[:keeps])
    checked(args, f"{name}: a cached index that cannot be read, as if cut short. Delete it, and Megatron builds it again")


def test_ids_beyond_the_vocabulary(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = namespace(data_path=["few", "one"], padded_vocab_size=500)
    check_token_ids(args)
    args.padded_vocab_size = 499
    with pytest.raises(DataError, match=r"--data-path one: token id 499 is outside the model's vocabulary of 499. Use the"):
        check_token_ids(args)
    # Of a large data set blocks are looked at, the last among them.
    monkeypatch.setattr(indexed_files, "_BLOCK_TOKENS", 5)
    monkeypatch.setattr(training_data, "_MAX_SCANNED_TOKENS", 20)
    with pytest.raises(DataError, match="token id 499"):
        check_token_ids(args)
    assert largest_id(open_index("few"), 10**6) == 9
