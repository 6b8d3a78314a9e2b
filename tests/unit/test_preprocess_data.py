"""tools/preprocess_data.py: what is written is what the tokenizer says, all of it or nothing, and reproducibly."""

from __future__ import annotations

import argparse
import bz2
import codecs
import errno
import gzip
import io
import itertools
import json
import lzma
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci_megatron.cli import main
from paci_megatron.cli import preprocess as command
from paci_megatron.data import DataError, corpus, encoding, preprocess, tokenizers
from paci_megatron.data.corpus import CorpusOptions, Document, iter_documents
from paci_megatron.data.sources import describe
from paci_megatron.data.staging import Staging
from paci_megatron.data.training_data import check_training_files

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "preprocess_data.py"
VOCAB_SIZE = 320

WORDS = ["pipeline", "stage", "micro-batch", "weight", "drain", "update", "naïve", "管道", "\t{x: 1}", "", "two"]
TEXTS = [
    " ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + i % 17)) + f"\n\n    line {i}\r\nlast {i}" for i in range(60)
]


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on TEXTS."""
    path = tmp_path_factory.mktemp("model") / "spm.model"
    path.write_bytes(tokenizers.train_sentencepiece(TEXTS, VOCAB_SIZE))
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    """Megatron's tokenizer for `model`."""
    return tokenizers.build_tokenizer(tokenizers.TokenizerOptions("SentencePieceTokenizer", str(model)), "spm")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """TEXTS as JSON Lines."""
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks from a small corpus."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 200)


def run(*arguments: object, model: Path | None = None) -> int:
    """The command line in this process; with `model`, as a SentencePiece tokenizer."""
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)] if model else []
    try:
        return main.run("preprocess", [*map(str, arguments), *tokenizer], "preprocess_data.py")
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def read(prefix: Path) -> list[list[int]]:
    """The documents of a `.bin/.idx`, read by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1)), "one sequence is one document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


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


# Inputs


def as_text_files(directory: Path) -> None:
    for i, text in enumerate(TEXTS):
        (directory / f"{i:03}.txt").write_bytes(text.encode())


def as_jsonl(directory: Path) -> None:
    half = len(TEXTS) // 2
    write_jsonl(directory / "a.jsonl", TEXTS[:half])
    (directory / "deep").mkdir()
    write_jsonl(directory / "deep" / "b.jsonl", TEXTS[half:])


def as_parquet(directory: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, directory / "a.parquet", row_group_size=7)


def as_saved_dataset(directory: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))}).save_to_disk(str(directory))


def as_saved_splits(directory: Path) -> None:
    import datasets

    train = datasets.Dataset.from_dict({"text": TEXTS})
    other = datasets.Dataset.from_dict({"text": ["not this"]})
    datasets.DatasetDict({"train": train, "other": other}).save_to_disk(str(directory))


LAYOUTS = [as_text_files, as_jsonl, as_parquet, as_saved_dataset, as_saved_splits]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_directory_has_the_same_tokens(
    tmp_path: Path, model: Path, tokenizer: Any, layout: Callable[[Path], None]
) -> None:
    (tmp_path / "in").mkdir()
    layout(tmp_path / "in")
    assert run("--input", tmp_path / "in", "--output-prefix", tmp_path / "out", model=model) == 0
    expected = [[*tokenizer.tokenize(text), tokenizer.eod] for text in TEXTS]
    assert read(tmp_path / "out_text_document") == expected


def texts_of(*inputs: object, **options: str) -> list[str]:
    chosen = CorpusOptions(tuple(map(str, inputs)), **options)
    return [document.text for document in iter_documents(chosen.sources(), chosen)]


def test_patterns_files_and_keys(tmp_path: Path) -> None:
    for name in ("b.md", "a.md", "c.rst"):
        (tmp_path / name).write_text(name)
    write_jsonl(tmp_path / "d.json", ["d"], key="body")
    inputs = (tmp_path / "*.md", tmp_path / "d.json", tmp_path / "c.rst")
    assert texts_of(*inputs, json_key="body") == ["a.md", "b.md", "d", "c.rst"]


@pytest.mark.parametrize(
    ("split_documents", "expected"),
    [
        ("file", ["\n\na\r\nb\n \n\nc d\n"]),
        ("line", ["", "", "a", "b", " ", "", "c d"]),
        ("blank-line", ["a\r\nb", "c d"]),
    ],
)
def test_split_documents(tmp_path: Path, split_documents: str, expected: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n\na\r\nb\n \n\nc d\n")
    assert texts_of(tmp_path / "a.txt", split_documents=split_documents) == expected


def test_a_name_is_streamed_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of("openwebtext", dataset_config="plain", dataset_split="train[:1]") == TEXTS
    assert asked == [("openwebtext", "plain", "train[:1]", True)]


ROWS = b'{"text": "hello world"}\n{"text": "second line"}\n'
TWO = ["hello world", "second line"]
PLAIN = b"hello world\nsecond line\n"


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


def tar(content: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(content))
    return packed.getvalue()


FILES: dict[str, tuple[str, bytes, list[str]]] = {
    # JSON Lines, whatever the name ends in
    "ndjson": ("data.ndjson", ROWS, TWO),
    "jsonlines": ("data.jsonlines", ROWS, TWO),
    "upper case": ("DATA.JSONL", ROWS, TWO),
    "no ending": ("part-00000", ROWS, TWO),
    "two endings": ("data.jsonl.txt", ROWS, TWO),
    "another": ("data.log", b"\n  " + ROWS, TWO),
    "one row": ("part-00001", ROWS.splitlines()[0], TWO[:1]),
    "long row": ("part-00002", json.dumps({"text": "x } " * 5000}).encode() + b"\n" + ROWS, ["x } " * 5000, *TWO]),
    "key last": ("part", b'{"id": {"a": [1, 2]}, "text": "a"}\n', ["a"]),
    # Text that only looks like it
    "JSON without the key": ("package.txt", b'{"name": "x"}\n', ['{"name": "x"}\n']),
    "pretty JSON": ("package.txt", b'{\n  "text": "x"\n}\n', ['{\n  "text": "x"\n}\n']),
    "braces": ("a.txt", b"{text} and\n{more}\n", ["{text} and\n{more}\n"]),
    "one row, then text": ("a.md", ROWS[:24] + b"and text", [ROWS[:24].decode() + "and text"]),
    "list": ("a.txt", b'["text"]\n', ['["text"]\n']),
    # Byte order marks
    "bom in JSON": ("bom.jsonl", codecs.BOM_UTF8 + ROWS, TWO),
    "bom in JSON without ending": ("bom", codecs.BOM_UTF8 + ROWS, TWO),
    "joined files with bom": ("bom.jsonl", (codecs.BOM_UTF8 + ROWS) * 2, TWO * 2),
    "bom in text": ("bom.txt", codecs.BOM_UTF8 + PLAIN, [PLAIN.decode()]),
    "only a bom": ("bom.txt", codecs.BOM_UTF8, [""]),
    # Compressed
    "gz": ("a.jsonl.gz", gzip.compress(ROWS), TWO),
    "gz of several": ("a.jsonl.gz", gzip.compress(ROWS) + gzip.compress(ROWS), TWO * 2),
    "zst": ("a.jsonl.zst", zstd(ROWS), TWO),
    "zst of several": ("a.jsonl.zst", zstd(ROWS) + zstd(ROWS), TWO * 2),
    "bz2": ("a.ndjson.bz2", bz2.compress(ROWS), TWO),
    "xz": ("a.json.xz", lzma.compress(ROWS), TWO),
    "compressed text": ("a.txt.GZ", gzip.compress(PLAIN), [PLAIN.decode()]),
    "compressed without a name for it": ("part-00003", gzip.compress(ROWS), TWO),
    "named as if compressed": ("a.jsonl.gz", ROWS, TWO),
    # Numbers
    "large integer": ("a.jsonl", b'{"text": "a", "id": ' + b"1" * 5000 + b"}\n", ["a"]),
    "negative one": ("a.jsonl", b'{"id": [-' + b"7" * 9000 + b'], "text": "a"}\n', ["a"]),
}


@pytest.mark.parametrize(("name", "content", "expected"), FILES.values(), ids=list(FILES))
def test_what_a_file_holds_decides_how_it_is_read(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path / name) == expected
    assert texts_of(tmp_path / "[a-zA-Z]*") == expected


def test_lines_of_a_file_with_a_bom(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + PLAIN)
    assert texts_of(tmp_path / "a.txt", split_documents="line") == TWO
    assert texts_of(tmp_path / "a.txt", split_documents="blank-line") == ["\n".join(TWO)]


FOLDERS: dict[str, tuple[dict[str, bytes], int, str]] = {
    "compressed shards": (
        {"a.jsonl": ROWS, "b.jsonl.gz": gzip.compress(ROWS), "c.jsonl.zst": zstd(ROWS)},
        6,
        "3 JSON Lines files",
    ),
    "several endings": ({"a.jsonl": ROWS, "b.ndjson": ROWS, "C.JSONL": ROWS, "d.jsonl.txt": ROWS}, 8, "4 JSON Lines files"),
    "notebook": ({"a.jsonl": ROWS, ".ipynb_checkpoints/a-checkpoint.jsonl": ROWS}, 2, "1 JSON Lines file"),
    "trash": ({"a.jsonl": ROWS, ".Trash/a.jsonl": ROWS, "sub/.hidden/b.jsonl": ROWS}, 2, "1 JSON Lines file"),
    "macOS": ({"a.jsonl": ROWS, "._a.jsonl": b"\x00\x05\x16\x07", "sub/._b.txt": b"\xb0"}, 2, "1 JSON Lines file"),
    "Spark": ({"part-00000": ROWS, "part-00001": ROWS, "_SUCCESS": b"", "README": b"text"}, 4, "2 JSON Lines files"),
    "text": ({"a.txt": PLAIN, "b.TXT": PLAIN, "c.txt.bz2": bz2.compress(PLAIN)}, 3, "3 text files"),
}


@pytest.mark.parametrize(("files", "num_documents", "said"), FOLDERS.values(), ids=list(FOLDERS))
def test_what_is_read_of_a_folder(tmp_path: Path, files: dict[str, bytes], num_documents: int, said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    options = CorpusOptions((str(tmp_path),))
    assert len(list(iter_documents(options.sources(), options))) == num_documents
    assert describe(options.sources()) == said


UNREADABLE: dict[str, tuple[str, bytes, str]] = {
    "nested": ("a.jsonl", b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "a.jsonl:1: nested too deep"),
    "nested later": ("part", ROWS + b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "part:3: nested too deep"),
    "integer as text": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "a.jsonl:1: key 'text' holds int, not text"),
    "cut gz": ("a.jsonl.gz", gzip.compress(ROWS)[:-9], "a.jsonl.gz: cannot be read: Compressed file ended"),
    "damaged gz": ("a.gz", gzip.compress(ROWS)[:-8] + b"\x00" * 8, "a.gz: cannot be read: CRC check failed"),
    "cut zst": ("a.zst", zstd(ROWS * 999)[:-9], "a.zst: cannot be read: Truncated"),
    "cut xz": ("a.xz", lzma.compress(ROWS)[:-9], "a.xz: cannot be read: Compressed file ended"),
    "zip": ("a.zip", b"PK\x03\x04" + ROWS, "a.zip: a zip archive, which is not read"),
    "tar": ("a.tar", tar(b""), "a.tar: a tar archive, which is not read"),
    "compressed tar": ("a.tgz", gzip.compress(tar(b"")), "a.tgz: a tar archive, which is not read"),
    "UTF-16": ("a.txt", PLAIN.decode().encode("utf-16"), "a.txt: UTF-16, not UTF-8"),
    "UTF-16 rows": ("a.jsonl", ROWS.decode().encode("utf-16"), "a.jsonl: UTF-16, not UTF-8"),
    "Arrow": ("a.arrow", b"ARROW1\x00\x00", "a.arrow: an Arrow file, which is not read"),
    "no Parquet": ("a.parquet", ROWS, "a.parquet: no Parquet file"),
    "compressed Parquet": ("a.parquet.gz", gzip.compress(b"PAR1"), "a.parquet.gz: Parquet inside another compression"),
}


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE.values(), ids=list(UNREADABLE))
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        texts_of(tmp_path / name)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(ROWS))
    for inputs in ((tmp_path,), (tmp_path / "*",), (tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl")):
        with pytest.raises(DataError, match="look like copies of each other; name one of them"):
            texts_of(*inputs)


# Bounded memory


def test_readers_read_no_further_than_asked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbad\n')
    options = CorpusOptions((str(tmp_path / "a.jsonl"),))
    documents = iter_documents(options.sources(), options)
    assert next(documents).text == "good"
    with pytest.raises(DataError, match=r"a\.jsonl:2: not valid JSON"):
        next(documents)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_only_a_few_chunks_are_under_way(tokenizer: Any, workers: int) -> None:
    read_so_far = 0

    def endless() -> Iterator[Document]:
        nonlocal read_so_far
        while True:
            read_so_far += 1
            yield Document("x" * 199, "here", 199)  # one chunk

    results = encoding.encode_in_order(encoding.chunked(endless()), encoding.Encoder(tokenizer, 2), workers)
    for taken in range(1, 20):
        assert next(results).num_bytes == [199]
        assert read_so_far <= taken + 2 * workers
    results.close()  # type: ignore[attr-defined]


def test_sample_is_bounded_uniform_and_reproducible() -> None:
    documents = [Document(f"{i:04}" * 25, "here", 100) for i in range(1000)]
    sample = tokenizers.sample_documents(iter(documents), 10_000, seed=1)
    assert len(sample) == 100
    assert sample == sorted(sample), "in the order of the corpus"
    assert sample == tokenizers.sample_documents(iter(documents), 10_000, seed=1)
    assert sample != tokenizers.sample_documents(iter(documents), 10_000, seed=2)
    assert 400 < np.mean([int(text[:4]) for text in sample]) < 600
    assert tokenizers.sample_documents(documents[:3], 10_000, seed=1) == [d.text for d in documents[:3]]
    assert len(tokenizers.sample_documents(documents, 1, seed=1)) == 1


# Interrupted


def in_a_child(target: Callable[[], None]) -> int | None:
    """Exit code of a forked process: faster than a new one, which would import Megatron again."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert not process.is_alive()
    return process.exitcode


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_the_earlier_output(
    tmp_path: Path, data: Path, model: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    prefix, children = tmp_path / "out" / "corpus", tmp_path / "children"
    arguments = ("--output-prefix", prefix, "--workers", workers)
    assert run("--input", data, *arguments, model=model) == 0
    earlier = contents(tmp_path / "out")
    shorter = write_jsonl(tmp_path / "shorter.jsonl", TEXTS[:-1])

    def killed_late(documents: Iterable[Document]) -> Iterator[Document]:
        for i, document in enumerate(documents):
            if i == 50:
                children.write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(command, "_progress", killed_late)
        code = in_a_child(lambda: sys.exit(run("--input", shorter, *arguments, model=model)))
    assert code == -signal.SIGKILL
    after = {name: data for name, data in contents(tmp_path / "out").items() if ".partial/" not in name}
    assert after == earlier
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) == (workers if workers > 1 else 0)
    orphans = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(orphans, timeout=10)[1], "workers end with their parent"

    # What the killed run left behind is not in the way of the next.
    assert run("--input", shorter, *arguments, model=model) == 0
    assert sorted(contents(tmp_path / "out")) == sorted(earlier)
    assert len(read(Path(f"{prefix}_text_document"))) == len(TEXTS) - 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_leaves_the_earlier_output_and_nothing_else(
    tmp_path: Path, data: Path, model: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--input", data, "--output-prefix", tmp_path / "out" / "corpus", "--workers", workers)
    assert run(*arguments, model=model) == 0
    earlier = contents(tmp_path / "out")

    def failing(documents: Iterable[Document]) -> Iterator[Document]:
        yield from itertools.islice(documents, 50)
        raise RuntimeError("a bug")

    monkeypatch.setattr(command, "_progress", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*arguments, "--seed", 5, model=model)
    assert contents(tmp_path / "out") == earlier
    with pytest.raises(RuntimeError, match="a bug"):
        run("--input", data, "--output-prefix", tmp_path / "new" / "deep" / "corpus", model=model)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def add_document(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", add_document)
    assert run("--input", data, "--output-prefix", tmp_path / "out" / "corpus", model=model) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_from_the_keyboard(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(documents: Iterable[Document]) -> Iterator[Document]:
        yield from itertools.islice(documents, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_progress", interrupted)
    assert run("--input", data, "--output-prefix", tmp_path / "out" / "corpus", model=model) == 130
    assert capsys.readouterr().err == "preprocess_data.py: interrupted\n"
    assert not (tmp_path / "out").exists()


def test_two_runs_with_one_prefix(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(DataError, match="another run is writing it"), Staging(str(tmp_path / "out")):
            pass

    with Staging(str(tmp_path / "out")) as staging:
        staging.write("_stats.json", b"first")
        assert in_a_child(second) == 0
        staging.publish()
    assert contents(tmp_path) == {"out_stats.json": b"first"}


class Killed:
    """Stands for a worker that the kernel kills for lack of memory."""

    def __call__(self, chunk: list[Document]) -> encoding.Encoded:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_ends_the_run() -> None:
    chunks = [[Document("x", "here", 1)]] * 10
    with pytest.raises(DataError, match="--workers 2: one of them was killed"):
        list(encoding.encode_in_order(chunks, Killed(), 2))  # type: ignore[arg-type]


# Bad input


def bad_inputs(folder: Path, model: Path) -> dict[str, tuple[list[object], str]]:
    """Name of the case -> arguments, and what the line must say. All but the first two have a good tokenizer."""
    import pyarrow
    import pyarrow.parquet

    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "a.txt.gz").write_bytes(b"\x1f\x8b")
    (folder / "no_json.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    (folder / "list.jsonl").write_text('["text"]\n')
    (folder / "keys.jsonl").write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "corrupt.parquet").write_bytes(b"PAR1 not really")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), folder / "keys.parquet")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").touch()
    (folder / "mixed" / "a.jsonl").touch()
    (folder / "nothing").mkdir()
    as_saved_splits(folder / "splits")
    as_saved_dataset(folder / "broken")
    next((folder / "broken").glob("*.arrow")).write_bytes(b"junk")
    good = write_jsonl(folder / "good.jsonl", TEXTS[:5])
    (folder / "corrupt.model").write_text("not a model")
    no_eod = folder / "no_eod.model"
    no_eod.write_bytes(sentencepiece_without_eos())
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    training = ["--input", good, "--train-tokenizer", "--vocab-size"]

    def of(*arguments: object) -> list[object]:
        return [*kind, model, "--input", *arguments]

    return {
        "missing file": (of(folder / "none.txt"), "none.txt: no such file"),
        "missing path": (of(folder / "none" / "data"), "none/data: no such file"),
        "no match": (of(folder / "*.md"), "*.md: no file matches"),
        "named twice": (of(good, folder / "*.jsonl"), "good.jsonl is named more than once"),
        "compressed": (of(folder / "a.txt.gz"), "a.txt.gz: cannot be read: Compressed file ended"),
        "empty": (of(folder / "empty.txt"), "empty.txt: no document has any text"),
        "encoding": (of(folder / "latin.txt"), "latin.txt: not UTF-8 at byte 2; convert it"),
        "mixed directory": (of(folder / "mixed"), "mixed: holds JSON Lines and text files; say which to read"),
        "empty directory": (of(folder / "nothing"), "holds no .jsonl, .ndjson, .jsonlines, .parquet, .txt file"),
        "not JSON": (of(folder / "no_json.jsonl"), "no_json.jsonl:2: not valid JSON (Expecting value at column 10)"),
        "not an object": (of(folder / "list.jsonl"), "list.jsonl:1: a JSON list; each line must be one JSON object"),
        "wrong key": (of(folder / "keys.jsonl"), "keys.jsonl:2: no key 'text'; its keys are: body, id; name one"),
        "not text": (of(folder / "number.jsonl"), "number.jsonl:1: key 'text' holds int, not text"),
        "surrogate": (of(folder / "surrogate.jsonl"), "surrogate.jsonl:1: not text: a lone surrogate at character 0"),
        "corrupt parquet": (of(folder / "corrupt.parquet"), "corrupt.parquet: cannot be read"),
        "parquet key": (of(folder / "keys.parquet"), "keys.parquet row 1: no key 'text'; its keys are: body, id"),
        "unknown split": (of(folder / "splits", "--dataset-split", "dev"), "dev: not in"),
        "corrupt data set": (of(folder / "broken"), "broken: cannot be read"),
        "split documents": (of(good, "--split-documents", "page"), "page: must be one of file, line, blank-line"),
        "fraction": (of(good, "--held-out-fraction", "1.5"), "--held-out-fraction 1.5: must be above 0 and below 1"),
        "nothing held out": (of(good, "--held-out-fraction", "1e-9"), "leaves no document with text for valid"),
        "workers": (of(good, "--workers", "0"), "--workers 0: must be at least 1"),
        "not a number": (of(good, "--seed", "x"), "--seed: invalid int value: 'x'"),
        "unknown flag": (of(good, "--sead", "1"), "unrecognized arguments: --sead 1"),
        "unknown tokenizer": (
            ["--input", good, "--tokenizer-type", "Word"],
            "Word: unknown; must be one of SentencePieceTokenizer,",
        ),
        "no tokenizer": (["--input", good], "--tokenizer-type is missing"),
        "no model": (["--input", good, *kind[:2]], "--tokenizer-model is missing"),
        "missing model": (["--input", good, *kind, folder / "no.model"], "no.model: no such file"),
        "corrupt model": (["--input", good, *kind, folder / "corrupt.model"], "corrupt.model: cannot be loaded"),
        "no eod": (["--input", good, *kind, no_eod], "no_eod.model: has no end-of-document token"),
        "vocabulary too large": ([*training, 9999], "--vocab-size 9999: SentencePiece cannot train it: Vocabulary"),
        "vocabulary too small": ([*training, 20], "--vocab-size 20: SentencePiece cannot train it: the text has so many"),
        "vocabulary of nothing": (
            ["--input", folder / "empty.txt", *training[2:], 300],
            "empty.txt: no document has any text",
        ),
        "size alone": (of(good, "--vocab-size", "300"), "one is missing; give both, or neither"),
        "train and use": ([*training, 300, *kind, model], "leave one out"),
        "train another": ([*training, 300, "--tokenizer-type", "GPT2BPETokenizer"], "trains SentencePiece, not GPT2"),
        "no vocabulary": (["--input", good, "--tokenizer-type", "GPT2BPETokenizer"], "--vocab-file is missing"),
    }


def sentencepiece_without_eos() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=100, model_type="char", eos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    cases = bad_inputs(tmp_path / "in", model)
    capsys.readouterr()
    for name, (arguments, said) in cases.items():
        code = run("--output-prefix", tmp_path / "out" / "corpus", *arguments)
        out, err = capsys.readouterr()
        assert code == 2, name
        assert out == "", name
        assert err.startswith("preprocess_data.py: error: "), name
        assert err.count("\n") == 1, (name, err)
        assert said in err, (name, err)
        assert not (tmp_path / "out").exists(), name


def test_output_that_cannot_be_written(tmp_path: Path, data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken_stats.json").mkdir()
    (tmp_path / "taken_text_document.idx").write_text("earlier")
    cases = {
        "a file is in the way": (tmp_path / "file" / "out", "Not a directory; choose a writable directory"),
        "no name": (f"{tmp_path}/new/", "/: must end in a name"),
        "a directory is in the way": (tmp_path / "taken", "taken_stats.json: it is a directory"),
    }
    before = sorted(tmp_path.iterdir())
    for name, (prefix, said) in cases.items():
        assert run("--input", data, "--output-prefix", prefix, model=model) == 2, name
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, (name, err)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken_text_document.idx").read_text() == "earlier"


def test_a_document_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 60 + "\n" + "é" * 30)
    (tmp_path / "b.txt").write_text("x\n" + "y" * 101)
    (tmp_path / "c.txt").write_text("x" * 99 + "\n\n" + "x" * 99)
    for name, split_documents, where in (
        ("a.txt", "file", "a.txt"),
        ("a.txt", "blank-line", "a.txt:1"),
        ("b.txt", "line", "b.txt:2"),
    ):
        with pytest.raises(DataError) as raised:
            texts_of(tmp_path / name, split_documents=split_documents)
        assert str(raised.value).startswith(f"{tmp_path}/{where}: a document of more than 0 MiB; cut it")
    assert len(texts_of(tmp_path / "c.txt", split_documents="blank-line")) == 2


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="--input openwebtext: cannot be read: Couldn't reach the hub; check"):
        texts_of("openwebtext")


def test_transformers_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="HuggingFaceTokenizer: needs transformers; pip install transformers"):
        tokenizers.TokenizerOptions("HuggingFaceTokenizer", "gpt2").validate()


# GPT-2 BPE and Hugging Face


def write_gpt2(folder: Path) -> tuple[Path, Path]:
    """A vocabulary of the 256 bytes, "he", "ll", "hell" and the end-of-text token, in GPT-2's two files."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = [*bytes_to_unicode().values(), "he", "ll", "hell", "<|endoftext|>"]
    vocab, merges = folder / "v.json", folder / "m.txt"
    vocab.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges.write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    return vocab, merges


def test_gpt2_bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Megatron's GPT2BPETokenizer needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vocab, merges = write_gpt2(tmp_path)
    (tmp_path / "a.txt").write_text("hello hé")
    gpt2 = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges)
    assert run("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "out", *gpt2) == 0
    pieces = list(json.loads(vocab.read_text()))
    eod = pieces.index("<|endoftext|>")
    expected = [[*map(pieces.index, ["hell", "o", "Ġ", "h", "Ã", "©"]), eod]]
    assert read(tmp_path / "out_text_document") == expected

    # The flags it prints are for what it has written, and give the same again.
    stats = json.loads((tmp_path / "out_stats.json").read_text())
    assert (stats["vocab_size"], stats["eod"]) == (len(pieces), eod)
    flags = stats["tokenizer_flags"]
    assert flags == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{tmp_path}/out_tokenizer"]
    assert run("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "again", *flags) == 0
    assert read(tmp_path / "again_text_document") == expected


def test_bad_gpt2_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Megatron's GPT2BPETokenizer needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vocab, merges = write_gpt2(tmp_path)
    vocab.write_text("{")
    text = tmp_path / "a.txt"
    text.write_text("hello")
    gpt2 = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file")
    huggingface = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*gpt2, merges), f"--vocab-file {vocab} --merge-file {merges}: cannot be loaded"),
        ((*gpt2, tmp_path / "none"), "none: no such file"),
        ((*huggingface, tmp_path / "none"), "none: cannot be loaded"),
    ]
    for arguments, said in cases:
        assert run("--input", text, "--output-prefix", tmp_path / "out" / "a", *arguments) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()


def test_own_vocabulary_is_not_read_as_text(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out_tokenizer").mkdir()
    (tmp_path / "out_tokenizer" / "merges.txt").write_text("a b")
    assert run("--input", tmp_path, "--output-prefix", tmp_path / "out", model=model) == 2
    assert "merges.txt: an output of this --output-prefix" in capsys.readouterr().err


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
