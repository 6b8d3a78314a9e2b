"""Documents of a corpus, one at a time: plain text, JSON Lines, Parquet, Hugging Face data sets. Files may be compressed.

Every reader is a generator that holds one document (Parquet: one batch of rows), so that memory does not grow
with the corpus. The order of the documents depends on nothing but the options and the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from paci_megatron.data import DataError
from paci_megatron.data.sources import BOM, MAX_DOCUMENT_BYTES, Source, find_sources, open_binary, parse_json, reading

SPLIT_DOCUMENTS = ("file", "line", "blank-line")

_PARQUET_BATCH_ROWS = 256


class Document(NamedTuple):
    """One text, where it came from (for error messages), and its size in UTF-8 bytes."""

    text: str
    origin: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What to read. `split_documents` is for plain text, `dataset_*` are for Hugging Face data sets."""

    inputs: tuple[str, ...]
    json_key: str = "text"
    split_documents: str = "file"
    dataset_config: str | None = None
    dataset_split: str = "train"

    def sources(self) -> list[Source]:
        """What `inputs` stand for, as :func:`find_sources` says."""
        if self.split_documents not in SPLIT_DOCUMENTS:
            allowed = ", ".join(SPLIT_DOCUMENTS)
            raise DataError(f"--split-documents {self.split_documents}: must be one of {allowed}")
        return find_sources(self.inputs, self.json_key)


def iter_documents(sources: Iterable[Source], options: CorpusOptions) -> Iterator[Document]:
    """All documents, lazily. DataError where something is unreadable, malformed, or has no key `json_key`."""
    for source in sources:
        if source.kind == "jsonl":
            yield from _read_jsonl(source.location, options.json_key)
        elif source.kind == "parquet":
            yield from _read_parquet(source.location, options.json_key)
        elif source.kind == "text":
            yield from _read_text(source.location, options.split_documents)
        else:
            yield from _read_dataset(source, options)


def _decode(data: bytes, origin: str) -> str:
    _check_size(len(data), origin)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "convert it, for example with iconv"
        raise DataError(f"{origin}: not UTF-8 at byte {error.start}; {remedy}") from error


def _check_size(num_bytes: int, origin: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        limit = MAX_DOCUMENT_BYTES >> 20
        remedy = "cut it, for example with --split-documents line or blank-line"
        raise DataError(f"{origin}: a document of more than {limit} MiB; {remedy}")


def _document(text: str, origin: str) -> Document:
    try:
        num_bytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character.
        detail = f"a lone surrogate at character {error.start}"
        raise DataError(f"{origin}: not text: {detail}; correct the escape sequence") from error
    _check_size(num_bytes, origin)
    return Document(text, origin, num_bytes)


def _read_text(path: str, split_documents: str) -> Iterator[Document]:
    if split_documents == "file":
        with reading(path), open_binary(path) as file:
            data = file.read(MAX_DOCUMENT_BYTES + len(BOM) + 1)
        yield _document(_decode(data.removeprefix(BOM), path), path)
    elif split_documents == "line":
        for origin, line in _lines(path):
            yield _document(line.rstrip("\r\n"), origin)
    else:
        yield from _read_paragraphs(path)


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """(file:line, the line with its end) of every line."""
    number = 0
    with reading(path), open_binary(path) as file:
        # The limit keeps a file without line ends from being read whole.
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            yield f"{path}:{number}", _decode(line.removeprefix(BOM) if number == 1 else line, f"{path}:{number}")


def _read_paragraphs(path: str) -> Iterator[Document]:
    """Runs of lines that are not blank, without the last line end."""
    paragraph: list[str] = []
    size = 0
    start = path
    for origin, line in _lines(path):
        if line.strip():
            start = start if paragraph else origin
            paragraph.append(line)
            size += len(line)
            _check_size(size, start)
        elif paragraph:
            yield _document("".join(paragraph).rstrip("\r\n"), start)
            paragraph, size = [], 0
    if paragraph:
        yield _document("".join(paragraph).rstrip("\r\n"), start)


def _read_jsonl(path: str, key: str) -> Iterator[Document]:
    for origin, line in _lines(path):
        if not line.strip():
            continue
        try:
            # Files that were joined have the mark of a beginning in the middle.
            row = parse_json(line.removeprefix("\ufeff"))
        except RecursionError as error:
            raise DataError(f"{origin}: nested too deep to be read; leave out all but the text") from error
        except json.JSONDecodeError as error:
            detail = f"{error.msg} at column {error.colno}"
            raise DataError(f"{origin}: not valid JSON ({detail}); put one object on each line") from error
        if not isinstance(row, dict):
            raise DataError(f"{origin}: a JSON {type(row).__name__}; each line must be one JSON object")
        yield _document(_text_of(row, key, origin), origin)


def _text_of(row: dict[str, Any], key: str, origin: str) -> str:
    """The text of a row; DataError if it has no such key or the value is not text."""
    if key not in row:
        raise DataError(f"{origin}: no key '{key}'; its keys are: {', '.join(row)}; name one with --json-key")
    if not isinstance(row[key], str):
        found = type(row[key]).__name__
        raise DataError(f"{origin}: key '{key}' holds {found}, not text; correct the data or --json-key")
    return row[key]


def _read_parquet(path: str, key: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    with reading(path, (OSError, pyarrow.ArrowException)), pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        # Only this column is read from disk; without it, the check of the first row names those that exist.
        columns = [key] if key in names else names
        number = 0
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                origin = f"{path} row {number}"
                yield _document(_text_of(row, key, origin), origin)


def _read_dataset(source: Source, options: CorpusOptions) -> Iterator[Document]:
    import datasets
    import pyarrow

    # `datasets` has no one error class: these are for an unknown split, a bad file, a missing network.
    with reading(source.location, (OSError, ValueError, RuntimeError, pyarrow.ArrowException)):
        if source.kind == "saved":
            dataset = datasets.load_from_disk(source.location)
        else:
            config, split = options.dataset_config, options.dataset_split
            dataset = datasets.load_dataset(source.location, config, split=split, streaming=True)
        if isinstance(dataset, datasets.DatasetDict):
            if options.dataset_split not in dataset:
                splits = ", ".join(dataset)
                raise DataError(f"--dataset-split {options.dataset_split}: not in {source.location}; use one of {splits}")
            dataset = dataset[options.dataset_split]
        if options.json_key in (dataset.column_names or []):
            dataset = dataset.select_columns([options.json_key])
        for number, row in enumerate(dataset, start=1):
            origin = f"{source.location} row {number}"
            yield _document(_text_of(row, options.json_key, origin), origin)
