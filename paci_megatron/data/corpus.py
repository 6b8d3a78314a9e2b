"""Documents of a corpus, one at a time: plain text, JSON Lines, Parquet, Hugging Face data sets.

Every reader is a generator that holds one document (Parquet: one batch of rows), so that memory does not grow
with the corpus. The order of the documents depends on nothing but the options and the data.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from paci_megatron.data import DataError

SPLIT_DOCUMENTS = ("file", "line", "blank-line")

# A document is tokenized in one piece; SentencePiece takes some 50 bytes of memory per byte of text.
MAX_DOCUMENT_BYTES = 64 << 20

_KIND_OF_SUFFIX = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text"}
# In a directory `.json` is more often metadata than JSON Lines, so there it has to be named.
_DIRECTORY_SUFFIXES = (".jsonl", ".parquet", ".txt")
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip")
_PARQUET_BATCH_ROWS = 256


class Document(NamedTuple):
    """One text, where it came from (for error messages), and its size in UTF-8 bytes."""

    text: str
    origin: str
    num_bytes: int


class Source(NamedTuple):
    """A file (kind text, jsonl or parquet), a directory `saved` by `datasets`, or a name on the `hub`."""

    kind: str
    location: str


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What to read. `split_documents` is for plain text, `dataset_*` are for Hugging Face data sets."""

    inputs: tuple[str, ...]
    json_key: str = "text"
    split_documents: str = "file"
    dataset_config: str | None = None
    dataset_split: str = "train"


def find_sources(options: CorpusOptions) -> list[Source]:
    """The files and data sets that `options.inputs` stand for, in the order they are read.

    DataError if one is missing, matches nothing, is of no known kind, or is named twice. Reads no data.
    """
    if options.split_documents not in SPLIT_DOCUMENTS:
        allowed = ", ".join(SPLIT_DOCUMENTS)
        raise DataError(f"--split-documents {options.split_documents}: must be one of {allowed}")
    sources = [source for value in options.inputs for source in _sources_of(value)]
    seen: set[str] = set()
    for source in sources:
        name = source.location if source.kind == "hub" else str(Path(source.location).resolve())
        if name in seen:
            # The copies could fall on both sides of the held-out split.
            raise DataError(f"--input: {source.location} is named more than once; name each file once")
        seen.add(name)
    return sources


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


def _sources_of(value: str) -> list[Source]:
    path = Path(value).expanduser()
    if path.is_file():
        return [_file_source(path)]
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Source("saved", str(path))]
        return _directory_sources(path)
    if path.exists():
        raise DataError(f"--input {value}: not a regular file, and it may have to be read twice; save it first")
    if glob.has_magic(value):
        matches = (Path(name) for name in sorted(glob.glob(str(path), recursive=True)))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise DataError(f"--input {value}: no file matches; correct the pattern")
        return [_file_source(file) for file in files]
    if _looks_like_a_path(value):
        raise DataError(f"--input {value}: no such file or directory; correct the path")
    return [Source("hub", value)]


def _looks_like_a_path(value: str) -> bool:
    """Whether a missing input is a mistyped path, so that the hub need not be asked for it."""
    path = Path(value)
    known_suffix = path.suffix in _KIND_OF_SUFFIX or path.suffix in _COMPRESSED_SUFFIXES
    if known_suffix or value.startswith(("/", ".", "~")):
        return True
    # A name on the hub is `name` or `owner/name`.
    return len(path.parts) > 2 or Path(path.parts[0]).is_dir()


def _file_source(path: Path) -> Source:
    if path.suffix in _COMPRESSED_SUFFIXES:
        raise DataError(f"--input {path}: compressed files are not read; decompress it first")
    return Source(_KIND_OF_SUFFIX.get(path.suffix, "text"), str(path))


def _directory_sources(path: Path) -> list[Source]:
    files = sorted(file for file in path.rglob("*") if file.suffix in _DIRECTORY_SUFFIXES and file.is_file())
    kinds = sorted({file.suffix for file in files})
    if len(kinds) != 1:
        found = f"{' and '.join(kinds)} files" if kinds else f"no {', '.join(_DIRECTORY_SUFFIXES)} file"
        example = f"'{path}/**/*{kinds[0] if kinds else '.md'}'"
        raise DataError(f"--input {path}: holds {found}; say which to read, for example --input {example}")
    return [_file_source(file) for file in files]


@contextmanager
def _reading(name: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turns what a reader's library raises into a DataError that names the input."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else error
        remedy = "check its name, and that it is complete"
        raise DataError(f"--input {name}: cannot be read: {detail}; {remedy}") from error


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
        with _reading(path), open(path, "rb") as file:
            yield _document(_decode(file.read(MAX_DOCUMENT_BYTES + 1), path), path)
    elif split_documents == "line":
        for origin, line in _lines(path):
            yield _document(line.rstrip("\r\n"), origin)
    else:
        yield from _read_paragraphs(path)


def _lines(path: str) -> Iterator[tuple[str, str]]:
    """(file:line, the line with its end) of every line."""
    with _reading(path), open(path, "rb") as file:
        number = 0
        # The limit keeps a file without line ends from being read whole.
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            yield f"{path}:{number}", _decode(line, f"{path}:{number}")


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
            row = json.loads(line)
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

    with _reading(path, (OSError, pyarrow.ArrowException)), pyarrow.parquet.ParquetFile(path) as file:
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
    with _reading(source.location, (OSError, ValueError, RuntimeError, pyarrow.ArrowException)):
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
