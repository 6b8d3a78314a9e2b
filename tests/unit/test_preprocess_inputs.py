"""What preprocessing reads: directories, files, patterns and names, in little memory."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paci_megatron.data import DataError, encoding, tokenizers
from paci_megatron.data.corpus import CorpusOptions, Document, iter_documents
from paci_megatron.data.sources import describe
from tests.support.preprocessing import TEXTS, as_saved_dataset, as_saved_splits, read, run, texts_of, write_jsonl


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
