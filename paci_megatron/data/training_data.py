"""The files that a training command names, checked before anything is built.

Megatron finds most of this out late: with an assertion without words, at the first evaluation, or never, because it counts
how often to pass over no document until there are enough tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paci_megatron.data import DataError
from paci_megatron.data.indexed import Index, check_cache, is_remote, largest_id, open_index

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"
"""Megatron's, for --data-path without --split."""

# Of a larger data set a sample is looked at: the wrong tokenizer shows in any part of it.
_MAX_SCANNED_TOKENS = 64 << 20


class Blend(NamedTuple):
    """The data sets of one flag, and whether a weight was given for each."""

    flag: str
    prefixes: list[str]
    is_weighted: bool


def check_tokenizer_files(args: argparse.Namespace) -> None:
    """`DataError` if a file of the tokenizer is missing."""
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = _given(args, name)
        # A Hugging Face tokenizer may be a name on the hub.
        local = path is not None and not is_remote(path) and _given(args, "tokenizer_type") != "HuggingFaceTokenizer"
        if local and not Path(path).exists():
            raise DataError(f"{_flag(name)} {path}: no such file. Give the tokenizer the data was preprocessed with.")


def check_training_files(args: argparse.Namespace) -> None:
    """`DataError` if a tokenizer file is missing, or the data are missing, corrupt, empty, or cannot be split as asked.

    `args` are Megatron's, parsed and not yet validated.
    """
    check_tokenizer_files(args)
    if _given(args, "mock_data"):
        return
    blends = read_blends(args)
    indices = {
        name: _open(args, blend) for name, blend in blends.items() if not any(is_remote(path) for path in blend.prefixes)
    }
    # With this flag the lengths come from the cache of an earlier run.
    if _given(args, "sft") or _given(args, "dataloader_fast_cache_load"):
        return
    if "data" in indices:
        _check_split(args, blends["data"], indices["data"])
    elif "data" not in blends:
        _check_needed(args, {name: name in blends for name in SPLITS})
        for name, opened in indices.items():
            _check_parts(args, blends[name], opened, {name: (0.0, 1.0)}, "")


def check_token_ids(args: argparse.Namespace) -> None:
    """`DataError` if the data have a token id that the model's vocabulary, `args.padded_vocab_size`, does not have."""
    if _given(args, "mock_data") or _given(args, "sft"):
        return
    named = [(blend.flag, prefix) for blend in read_blends(args).values() for prefix in blend.prefixes]
    for flag, prefix in named:
        if not is_remote(prefix):
            check_ids_of(f"{flag} {prefix}", largest_id(open_index(prefix), _MAX_SCANNED_TOKENS // len(named)), args)


def check_ids_of(named: str, largest: int, args: argparse.Namespace) -> None:
    """`DataError` if the largest token id of the data called `named` is outside the model's vocabulary."""
    size = args.padded_vocab_size
    if size is not None and largest >= size:
        raise DataError(
            f"{named}: token id {largest} is outside the model's vocabulary of {size}. "
            "Use the tokenizer that the model is trained with and the data were preprocessed with."
        )


def read_blends(args: argparse.Namespace) -> dict[str, Blend]:
    """The data sets of all splits, as "data", or those of "train", "valid" and "test". `DataError` if none or malformed."""
    given = [name for name in ("data_path", "data_args_path", "per_split_data_args_path") if _given(args, name)]
    given += ["train_data_path"] if any(_given(args, f"{name}_data_path") for name in SPLITS) else []
    if not given:
        raise DataError(
            "no training data: give --data-path PREFIX (the path of a .bin and .idx file without its ending, as "
            "paci-megatron preprocess writes them), or --mock-data."
        )
    if len(given) > 1:
        raise DataError(
            f"{' and '.join(_flag(name) for name in given)}: more than one source of data. Leave one of them out."
        )
    if given == ["data_path"]:
        return {"data": parse_blend("--data-path", args.data_path)}
    if given == ["data_args_path"]:
        flag = f"--data-args-path {args.data_args_path}"
        if _given(args, "split") is None:
            raise DataError(f"{flag}: --split is missing. Give for example --split {DEFAULT_SPLIT}.")
        return {"data": parse_blend(flag, _read(flag, args.data_args_path).split())}
    if _given(args, "split") is not None:
        raise DataError(f"--split {args.split}: {_flag(given[0])} says by itself what each split is. Remove --split.")
    if given == ["per_split_data_args_path"]:
        words = _read_per_split(args.per_split_data_args_path)
        flags = {name: f"--per-split-data-args-path {args.per_split_data_args_path}: {name}" for name in SPLITS}
    else:
        words = {name: _given(args, f"{name}_data_path") for name in SPLITS}
        flags = {name: f"--{name}-data-path" for name in SPLITS}
    return {name: parse_blend(flags[name], list_) for name, list_ in words.items() if list_ is not None}


def parse_blend(flag: str, words: Sequence[str]) -> Blend:
    """A list of prefixes, or of weights and prefixes in turn. `DataError` if it is neither, or a weight is not above 0."""
    said = f"{flag} {' '.join(words)}"
    if not words:
        raise DataError(f"{flag}: names no data. Give a prefix, or WEIGHT PREFIX WEIGHT PREFIX ...")
    weights, prefixes = words[::2], [word.strip() for word in words[1::2]]
    if len(words) % 2 == 0 and all(_number(word) is not None for word in weights):
        for word in weights:
            if not 0 < (_number(word) or 0.0) < math.inf:
                raise DataError(f"{said}: the weight {word} must be a number above 0. Leave out data with weight 0.")
        return Blend(flag, prefixes, True)
    prefixes = [word.strip() for word in words]
    if any(_number(word) is not None and not Path(f"{word}.idx").exists() for word in prefixes):
        remedy = "Give WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes only"
        raise DataError(f"{said}: weights and prefixes do not take turns. {remedy}.")
    return Blend(flag, prefixes, False)


def fitting_split(proportions: Sequence[float], counts: Sequence[int], evaluates: bool) -> str | None:
    """A `--split` near `proportions` that leaves none of its splits without a document; None if there is none.

    `counts` are the numbers of documents of the data sets. One document cannot be in two splits.
    """
    train, valid, test = proportions
    smallest = min(counts)
    candidates = [(train, valid, test), (train, valid, 0), (smallest - 1, 1, 0)] if evaluates else [(train or 1, 0, 0)]
    for candidate in candidates:
        parts = bounds(candidate)
        enough = "train" in parts and ("valid" in parts or not evaluates)
        if enough and all(end > begin for count in counts for begin, end in _documents(parts, count).values()):
            return ",".join(f"{share:g}" for share in candidate)
    return None


def split_flags(num_documents: int) -> list[str]:
    """The flags with which one data set of so many documents trains: near Megatron's default, without an empty split."""
    found = fitting_split(_parse_split(DEFAULT_SPLIT), [num_documents], evaluates=True)
    # One document cannot be trained on and evaluated on.
    return ["--split", "1,0,0", "--eval-iters", "0"] if found is None else ["--split", found]


def bounds(proportions: Sequence[float]) -> dict[str, tuple[float, float]]:
    """Where in the data each split with a share begins and ends, from 0 to 1, as Megatron computes it."""
    total = np.sum(np.array(proportions, dtype=np.float64))
    if not total:
        return {}
    shares = (np.array(proportions, dtype=np.float64) / total).tolist()
    edges = [0.0]
    for share in shares:
        edges.append(edges[-1] + share)
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(SPLITS) if edges[i + 1] > edges[i]}


def _documents(parts: dict[str, tuple[float, float]], count: int) -> dict[str, tuple[int, int]]:
    """The numbers of the first document of each split, and of the first after it, as Megatron rounds."""
    return {name: (round(begin * count), round(end * count)) for name, (begin, end) in parts.items()}


def _check_split(args: argparse.Namespace, blend: Blend, opened: list[Index]) -> None:
    split = _given(args, "split")
    proportions = _parse_split(split) if split is not None else _parse_split(DEFAULT_SPLIT)
    said = f"--split {split}" if split is not None else f"--split {DEFAULT_SPLIT}, which is the default"
    parts = bounds(proportions)
    remedy = _split_remedy(proportions, opened, _evaluates(args))
    _check_needed(args, {name: name in parts for name in SPLITS}, f"{said}: ", remedy)
    _check_parts(args, blend, opened, parts, f"{said}: ", remedy)


def _check_needed(args: argparse.Namespace, there: dict[str, bool], said: str = "", remedy: str | None = None) -> None:
    if not there["train"] and not _given(args, "skip_train"):
        raise DataError(f"{said}there are no data to train on. {remedy or 'Give --train-data-path'}.")
    if not there["valid"] and _evaluates(args):
        remedy = remedy or "Give --valid-data-path, or --eval-iters 0"
        raise DataError(f"{said}there are no data for the evaluations that --eval-iters asks for. {remedy}.")


def _check_parts(
    args: argparse.Namespace,
    blend: Blend,
    opened: Sequence[Index],
    parts: dict[str, tuple[float, float]],
    said: str,
    remedy: str = "Preprocess a longer text, or leave this one out",
) -> None:
    """`DataError` if a part has no token, or where Megatron takes whole samples only, too few for one."""
    takes_whole_samples = len(opened) > 1 and not blend.is_weighted
    least = ((_given(args, "seq_length") or 0) + 1) if takes_whole_samples else 1
    for index in opened:
        for name, (begin, end) in _documents(parts, len(index.lengths)).items():
            found = int(np.sum(index.lengths[begin:end], dtype=np.int64))
            if found >= least:
                continue
            count = len(index.lengths)
            if begin == end:
                why = f"leaves {name} without a document"
            elif not found:
                why = f"leaves {name} without a token"
            else:
                why = f"leaves {name} {found} tokens, and without weights --data-path takes {least} for a sample of each"
            raise DataError(f"{said}{why} of the {count} in {index.prefix}. {remedy}.")


def _split_remedy(proportions: Sequence[float], opened: Sequence[Index], evaluates: bool) -> str:
    found = fitting_split(proportions, [len(index.lengths) for index in opened], evaluates)
    if found is not None and found != ",".join(f"{share:g}" for share in proportions):
        return f"Give --split {found}"
    if evaluates and min(len(index.lengths) for index in opened) == 1:
        cut = "preprocess it again with --split-documents blank-line or line"
        return f"One document cannot be split: {cut}; or give --split 1,0,0 --eval-iters 0"
    return "Give another --split, or preprocess more documents"


def _parse_split(text: str) -> list[float]:
    """The three proportions; `DataError` for what Megatron would read as something else, or not at all."""
    words = re.split(r"[,\s/;:]+", text.strip(" \t,[]()"))
    numbers = [_number(word) for word in words]
    if not all(re.fullmatch(r"[.\d]+", word) for word in words) or None in numbers or len(numbers) > len(SPLITS):
        remedy = f"Give the proportions of train, valid and test, like --split {DEFAULT_SPLIT}"
        raise DataError(f"--split {text}: not up to three numbers of at least 0 with commas between. {remedy}.")
    proportions = [number for number in numbers if number is not None] + [0.0] * (len(SPLITS) - len(numbers))
    if not any(proportions):
        raise DataError(f"--split {text}: nothing is left of the data. Give for example --split {DEFAULT_SPLIT}.")
    return proportions


def _evaluates(args: argparse.Namespace) -> bool:
    return bool(_given(args, "eval_iters") or _given(args, "full_validation"))


def _open(args: argparse.Namespace, blend: Blend) -> list[Index]:
    if _given(args, "sft"):
        for path in blend.prefixes:
            if not Path(path).is_file():
                raise DataError(f"{blend.flag} {path}: no such file. With --sft give JSON Lines of conversations.")
        return []
    opened = [open_index(prefix) for prefix in blend.prefixes]
    for prefix in blend.prefixes:
        check_cache(prefix, _given(args, "data_cache_path"))
    return opened


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{flag}: cannot be read: {reason}. Give a file that lists the data.") from error


def _read_per_split(path: str) -> dict[str, list[str] | None]:
    flag = f"--per-split-data-args-path {path}"
    remedy = 'Give a JSON object like {"train": ["PREFIX"], "valid": ["PREFIX"], "test": null}'
    try:
        read: Any = json.loads(_read(flag, path))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{flag}: not JSON. {remedy}.") from error
    if not isinstance(read, dict) or (missing := [name for name in SPLITS if name not in read]):
        found = f"has no {missing[0]}" if isinstance(read, dict) else "not a JSON object"
        raise DataError(f"{flag}: {found}. {remedy}.")
    return {name: list(_words(read[name], f"{flag}: {name}")) if read[name] is not None else None for name in SPLITS}


def _words(value: Any, flag: str) -> Iterator[str]:
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise DataError(f'{flag}: not a list of texts. Write weights as texts too, like ["0.3", "PREFIX"].')
    yield from value


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _given(args: argparse.Namespace, name: str) -> Any:
    return getattr(args, name, None)  # a YAML configuration may lack any of them


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
