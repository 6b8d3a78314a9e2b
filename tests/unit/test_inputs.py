"""Files that a training command names are checked before anything is built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.platform.without_te import check_installed, has_transformer_engine
from paci_megatron.plugin.inputs import check_inputs, exit_on_config_error


def namespace(**changes: Any) -> argparse.Namespace:
    """No files named, and no mock data."""
    names = ("tokenizer_model", "vocab_file", "merge_file", "data_path", "train_data_path", "valid_data_path")
    more = ("test_data_path", "data_args_path", "per_split_data_args_path")
    nothing = {"tokenizer_type": "GPT2BPETokenizer", "mock_data": False, **dict.fromkeys((*names, *more))}
    return argparse.Namespace(**{**nothing, **changes})


def test_good_input_passes(corpus: str) -> None:
    check_inputs(namespace(data_path=["0.3", corpus, "0.7", corpus]))
    check_inputs(namespace(train_data_path=[corpus], valid_data_path=[corpus]))
    check_inputs(namespace(mock_data=True))
    check_inputs(namespace(data_args_path="blend.txt"))
    check_inputs(namespace(mock_data=True, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="org/name"))


@pytest.mark.parametrize("flag", ["tokenizer_model", "vocab_file", "merge_file"])
def test_missing_tokenizer_file(flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{flag.replace('_', '-')} no/such.model: no such file. Give the tokenizer"):
        check_inputs(namespace(mock_data=True, **{flag: "no/such.model"}))


def test_no_data_at_all() -> None:
    with pytest.raises(ConfigError, match=r"no training data: give --data-path PREFIX.*or --mock-data"):
        check_inputs(namespace())


@pytest.mark.parametrize("missing", [".idx", ".bin"])
def test_missing_data_file(corpus: str, tmp_path: Path, missing: str) -> None:
    prefix = copied(corpus, tmp_path)
    Path(prefix + missing).unlink()
    with pytest.raises(ConfigError, match=rf"data{missing}: no such file. --data-path takes the path without .bin or .idx"):
        check_inputs(namespace(data_path=[prefix]))


@pytest.mark.parametrize("header", [b"", b"MMIDIDX", b"\x00" * 60])
def test_corrupt_index(corpus: str, tmp_path: Path, header: bytes) -> None:
    prefix = copied(corpus, tmp_path)
    Path(prefix + ".idx").write_bytes(header)
    with pytest.raises(ConfigError, match=r"data.idx is not an index of Megatron's IndexedDataset"):
        check_inputs(namespace(data_path=[prefix]))


def test_empty_corpus(corpus: str, tmp_path: Path) -> None:
    prefix = copied(corpus, tmp_path)
    Path(prefix + ".bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data: no document in it. Preprocess a corpus that has text"):
        check_inputs(namespace(valid_data_path=[prefix]))


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_error_becomes_one_line_on_the_first_rank_and_status_2_on_all(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught, exit_on_config_error():
        raise ConfigError("--flag 3: too many. Give 2.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "paci-megatron: error: --flag 3: too many. Give 2.\n" * lines


def copied(prefix: str, folder: Path) -> str:
    for ending in (".bin", ".idx"):
        (folder / f"data{ending}").write_bytes(Path(prefix + ending).read_bytes())
    return str(folder / "data")


@pytest.mark.skipif(has_transformer_engine(), reason="then it is possible")
def test_context_parallelism_needs_transformer_engine() -> None:
    check_installed(argparse.Namespace(context_parallel_size=1))
    with pytest.raises(ConfigError, match=r"--context-parallel-size 2 needs Transformer Engine.*--sequence-parallel"):
        check_installed(argparse.Namespace(context_parallel_size=2))
