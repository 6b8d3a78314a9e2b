"""tools/preprocess_data.py: what is written is what the tokenizer says, all of it or nothing, and reproducibly."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci_megatron.data import DataError, encoding, preprocess, tokenizers
from paci_megatron.data.corpus import CorpusOptions, Document
from paci_megatron.data.training_data import check_training_files
from tests.support.preprocessing import ROOT, SCRIPT, TEXTS, VOCAB_SIZE, contents, read, run, write_jsonl

# What is written


def test_round_trip(tmp_path: Path, data: Path, model: Path, tokenizer: Any) -> None:
    assert run("--input", data, "--output-prefix", tmp_path / "out", model=model) == 0
    documents = read(tmp_path / "out_text_document")
    assert documents == [[*tokenizer.tokenize(text), tokenizer.eod] for text in TEXTS]
    assert [tokenizer.detokenize(ids[:-1]) for ids in documents] == TEXTS
    stats = json.loads((tmp_path / "out_stats.json").read_text())
    assert stats["splits"]["text"] == {
        "num_documents": len(TEXTS),
        "num_tokens": sum(map(len, documents)),
        "num_words": sum(len(text.split()) for text in TEXTS),
        "num_bytes": sum(len(text.encode()) for text in TEXTS),
    }
    assert stats["vocab_size"] == VOCAB_SIZE
    assert stats["eod"] == tokenizer.eod
    # Small vocabularies take two bytes per token.
    assert (tmp_path / "out_text_document.bin").stat().st_size == 2 * sum(map(len, documents))


def test_reports_the_counts_and_the_training_flags(
    tmp_path: Path, data: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out"
    assert run("--input", data, "--output-prefix", prefix, "--held-out-fraction", 0.3, model=model) == 0
    out, err = capsys.readouterr()
    files, train, valid, flags = out.splitlines()
    assert files == "read: 1 JSON Lines file"
    assert train.startswith(f"{prefix}_train_document: ")
    assert valid.startswith(f"{prefix}_valid_document: ")
    assert flags == (
        f"train with: --tokenizer-type SentencePieceTokenizer --tokenizer-model {model} "
        f"--train-data-path {prefix}_train_document --valid-data-path {prefix}_valid_document"
    )
    assert err == ""


@pytest.mark.parametrize(
    ("num_documents", "expected"),
    [(1, "1,0,0 --eval-iters 0"), (2, "1,1,0"), (16, "15,1,0"), (60, "969,30,0"), (600, "969,30,1")],
)
def test_prints_a_split_that_training_accepts(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], num_documents: int, expected: str
) -> None:
    path = write_jsonl(tmp_path / "corpus.jsonl", ["two words"] * num_documents)
    assert run("--input", path, "--output-prefix", tmp_path / "out", model=model) == 0
    flags = capsys.readouterr().out.split("train with: ")[1].split()
    assert " ".join(flags[flags.index("--split") + 1 :]) == expected
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--eval-iters", type=int, default=100)
    for flag in ("--split", "--tokenizer-type", "--tokenizer-model"):
        parser.add_argument(flag)
    check_training_files(parser.parse_args(flags))


def test_without_eod(tmp_path: Path, data: Path, model: Path, tokenizer: Any) -> None:
    assert run("--input", data, "--output-prefix", tmp_path / "out", "--no-append-eod", model=model) == 0
    assert read(tmp_path / "out_text_document") == [tokenizer.tokenize(text) for text in TEXTS]


class FakeTokenizer:
    """One id per character, 9 after each text, as some Hugging Face tokenizers do."""

    vocab_size = 70_000

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) for character in text] + [9]


def test_an_eod_of_the_tokenizer_itself_is_not_doubled() -> None:
    documents = [Document(text, "here", len(text)) for text in ("ab", "", "c")]
    encoded = encoding.Encoder(FakeTokenizer(), eod=9)(documents)
    assert encoded.ids.tolist() == [97, 98, 9, 99, 9]
    assert encoded.lengths == [3, 0, 2]
    assert encoded.ids.dtype == np.int32, "this vocabulary does not fit in 16 bits"


def test_documents_without_text_are_left_out_and_change_no_side(tmp_path: Path, model: Path) -> None:
    sparse = write_jsonl(tmp_path / "sparse.jsonl", [text if i % 3 else "" for i, text in enumerate(TEXTS)])
    full = write_jsonl(tmp_path / "full.jsonl", TEXTS)
    for path in (sparse, full):
        prefix = tmp_path / path.stem
        assert run("--input", path, "--output-prefix", prefix, "--held-out-fraction", 0.3, model=model) == 0
    for name in ("train", "valid"):
        left = read(tmp_path / f"sparse_{name}_document")
        assert all(len(ids) > 1 for ids in left)
        whole = read(tmp_path / f"full_{name}_document")
        assert [ids for ids in whole if ids in left] == left


# Reproducible


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("fraction", [[], ["--held-out-fraction", 0.3]])
def test_same_bytes_for_any_number_of_workers(tmp_path: Path, data: Path, model: Path, fraction: list[object]) -> None:
    outputs = []
    for name, workers in (("one", 1), ("again", 1), ("two", 2), ("three", 3)):
        prefix = tmp_path / name / "out"
        assert run("--input", data, "--output-prefix", prefix, "--workers", workers, *fraction, model=model) == 0
        outputs.append(contents(tmp_path / name))
    assert len(outputs[0]) == (5 if fraction else 3)
    assert outputs[1:] == outputs[:1] * 3


def test_split_is_a_partition_by_document(tmp_path: Path, data: Path, model: Path) -> None:
    assert run("--input", data, "--output-prefix", tmp_path / "all", model=model) == 0
    documents = read(tmp_path / "all_text_document")
    held_out = []
    for seed in (1, 2):
        prefix = tmp_path / str(seed)
        options = ("--held-out-fraction", 0.3, "--seed", seed)
        assert run("--input", data, "--output-prefix", prefix, *options, model=model) == 0
        train, valid = read(Path(f"{prefix}_train_document")), read(Path(f"{prefix}_valid_document"))
        assert sorted(train + valid) == sorted(documents)
        # Each side keeps the order of the corpus.
        for side in (train, valid):
            assert side == [ids for ids in documents if ids in side]
        assert 5 < len(valid) < 35
        held_out.append(valid)
    assert held_out[0] != held_out[1], "the seed decides"


def test_the_held_out_share_is_the_fraction() -> None:
    tokenizer = tokenizers.TokenizerOptions("SentencePieceTokenizer")
    options = preprocess.PreprocessOptions(CorpusOptions(()), tokenizer, "x", held_out_fraction=0.02)
    share = sum(options.split_of(i) == "valid" for i in range(50_000)) / 50_000
    assert abs(share - 0.02) < 0.002


def test_trains_a_tokenizer_on_what_is_not_held_out(tmp_path: Path, data: Path) -> None:
    options = ("--train-tokenizer", "--vocab-size", VOCAB_SIZE, "--held-out-fraction", 0.3)
    for name in ("one", "two"):
        assert run("--input", data, "--output-prefix", tmp_path / name / "out", *options) == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    del one["out_stats.json"], two["out_stats.json"]  # the path of the tokenizer is in there
    assert one == two
    named = preprocess.PreprocessOptions(
        CorpusOptions((str(data),)), tokenizers.TokenizerOptions(""), "", held_out_fraction=0.3
    )
    seen = [text for i, text in enumerate(TEXTS) if named.split_of(i) == "train"]
    assert one["out_tokenizer.model"] == tokenizers.train_sentencepiece(seen, VOCAB_SIZE)
    flags = json.loads((tmp_path / "one" / "out_stats.json").read_text())["tokenizer_flags"]
    assert flags == [
        "--tokenizer-type",
        "SentencePieceTokenizer",
        "--tokenizer-model",
        str(tmp_path / "one" / "out_tokenizer.model"),
    ]
    # The published tokenizer reads the published data.
    kind, path = flags[1], flags[3]
    tokenizer = tokenizers.build_tokenizer(tokenizers.TokenizerOptions(kind, path), "trained")
    assert tokenizer.vocab_size == VOCAB_SIZE
    texts = [tokenizer.detokenize(ids[:-1]) for ids in read(tmp_path / "one" / "out_train_document")]
    assert texts == seen


def test_every_character_but_one_comes_back_from_a_trained_tokenizer(tokenizer: Any) -> None:
    for text in (
        "  a  b\n\tc ",
        "naïve 管道 \U0001f600",
        "\x00\x7f\u00ad\ufeff\u2028 x",
        "e\u0301 ﬁ ½ \uff21",
        "</s> <unk> <0x41>",
    ):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.detokenize(tokenizer.tokenize("a\u2581b")) == "a b"


def test_the_smallest_vocabulary_is_named_and_works() -> None:
    with pytest.raises(DataError, match=r"it must be at least \d+$") as caught:
        tokenizers.train_sentencepiece(TEXTS, 20)
    assert "coverage" not in str(caught.value)
    assert tokenizers.train_sentencepiece(TEXTS, int(str(caught.value).rsplit(" ", 1)[1]))


# As Megatron has it


def test_the_arguments_of_megatrons_builder_are_its_defaults() -> None:
    from megatron.training.config.training_config import TokenizerConfig

    given = vars(tokenizers.megatron_arguments(tokenizers.TokenizerOptions("HuggingFaceTokenizer", "x")))
    expected = vars(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="x"))
    del given["pad_vocab_size"]
    assert given == {name: expected[name] for name in given}


def test_a_worker_can_be_sent_the_encoder(tokenizer: Any) -> None:
    encoder = pickle.loads(pickle.dumps(encoding.Encoder(tokenizer, tokenizer.eod)))
    text = TEXTS[0]
    assert encoder([Document(text, "here", 1)]).ids.tolist() == [*tokenizer.tokenize(text), tokenizer.eod]


# As a program


def test_the_program_says_only_what_matters(tmp_path: Path, data: Path, model: Path) -> None:
    arguments = ["--input", str(data), "--output-prefix", "corpus", "--workers", "2"]
    flags = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("corpus_text_document: 60 documents, ")
    assert len(read(tmp_path / "corpus_text_document")) == len(TEXTS)


def test_a_wrong_path_is_refused_before_megatron_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from paci_megatron.cli import preprocess; "
        "code = preprocess.main(['--input', 'none.txt', '--output-prefix', 'x', '--train-tokenizer', '--vocab-size', '9']);"
        "heavy = {'torch', 'megatron', 'datasets', 'sentencepiece', 'transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    message = "--input none.txt: no such file or directory; correct the path"
    assert (done.returncode, done.stderr) == (2, f"paci-megatron preprocess: error: {message}\n")
    assert not any(tmp_path.iterdir())
