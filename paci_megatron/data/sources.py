"""The files and data sets that a corpus is read from. What a file holds decides how it is read, not how its name ends."""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from paci_megatron.data import DataError

# A document is tokenized in one piece; SentencePiece takes some 50 bytes of memory per byte of text.
MAX_DOCUMENT_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"

_JSON_LINES_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
# In a directory `.json` is more often metadata than JSON Lines, so there it has to be named.
_DIRECTORY_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".parquet", ".txt")
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".zip", ".tgz")
_KNOWN_ENDINGS = (*_JSON_LINES_ENDINGS, ".parquet", ".txt", *_COMPRESSED_ENDINGS)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NAMES = {"jsonl": "JSON Lines", "parquet": "Parquet", "text": "text"}
_HEAD_BYTES = 4096


class Source(NamedTuple):
    """A file (kind text, jsonl or parquet), a directory `saved` by `datasets`, or a name on the `hub`."""

    kind: str
    location: str


def find_sources(inputs: Iterable[str], json_key: str) -> list[Source]:
    """The files and data sets that `inputs` stand for, in the order they are read.

    DataError if one is missing, matches nothing, is of no known kind, or is named twice. Reads the beginning of each file.
    """
    sources = [source for value in inputs for source in _sources_of(value, json_key)]
    seen: dict[str, str] = {}
    for source in sources:
        name = source.location if source.kind == "hub" else _without_compression(str(Path(source.location).resolve()))
        if name in seen:
            # The copies could fall on both sides of the held-out split.
            twice = f"{source.location} is named more than once; name each file once"
            copies = f"{seen[name]} and {source.location} look like copies of each other; name one of them"
            raise DataError(f"--input: {twice if seen[name] == source.location else copies}")
        seen[name] = source.location
    return sources


def describe(sources: Iterable[Source]) -> str:
    """How many files of which kind these are, in words."""
    counts = Counter(source.kind for source in sources)
    files = [f"{counts[kind]} {name} file{'s' if counts[kind] > 1 else ''}" for kind, name in _NAMES.items() if counts[kind]]
    others = counts["saved"] + counts["hub"]
    return ", ".join([*files, *([f"{others} data set{'s' if others > 1 else ''}"] if others else [])])


def _sources_of(value: str, json_key: str) -> list[Source]:
    path = Path(value).expanduser()
    if path.is_file():
        return [_file_source(path, json_key)]
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [Source("saved", str(path))]
        return _directory_sources(path, json_key)
    if path.exists():
        raise DataError(f"--input {value}: not a regular file, and it may have to be read twice; save it first")
    if glob.has_magic(value):
        # The pattern matches names that begin with a dot only where it says so.
        matches = (Path(name) for name in sorted(glob.glob(str(path), recursive=True)))
        files = [file for file in matches if file.is_file()]
        if not files:
            raise DataError(f"--input {value}: no file matches; correct the pattern")
        return [_file_source(file, json_key) for file in files]
    if _looks_like_a_path(value):
        raise DataError(f"--input {value}: no such file or directory; correct the path")
    return [Source("hub", value)]


def _looks_like_a_path(value: str) -> bool:
    """Whether a missing input is a mistyped path, so that the hub need not be asked for it."""
    path = Path(value)
    if path.suffix.lower() in _KNOWN_ENDINGS or value.startswith(("/", ".", "~")):
        return True
    # A name on the hub is `name` or `owner/name`.
    return len(path.parts) > 2 or Path(path.parts[0]).is_dir()


def _directory_sources(path: Path, json_key: str) -> list[Source]:
    """Its files with a known ending, compressed or not, or without any if they hold JSON Lines, all of one kind."""
    files = sorted(file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and file.is_file())
    ending = {file: Path(_without_compression(file.name)).suffix.lower() for file in files}
    sources = [_file_source(file, json_key) for file in files if ending[file] in _DIRECTORY_ENDINGS]
    unnamed = (_file_source(file, json_key) for file in files if not ending[file] and file.stat().st_size)
    # Others without an ending, like README or Spark's _SUCCESS, are no data.
    sources = sorted(
        [*sources, *(source for source in unnamed if source.kind != "text")], key=lambda source: source.location
    )
    kinds = sorted({source.kind for source in sources})
    if len(kinds) != 1:
        found = (
            " and ".join(_NAMES[kind] for kind in kinds) + " files" if kinds else f"no {', '.join(_DIRECTORY_ENDINGS)} file"
        )
        example = f"'{path}/**/*{ending[Path(sources[0].location)] if kinds else '.md'}'"
        raise DataError(f"--input {path}: holds {found}; say which to read, for example --input {example}")
    return sources


def _is_hidden(path: Path) -> bool:
    """Whether a name on the way begins with a dot: .ipynb_checkpoints, .Trash, the ._x that macOS leaves."""
    return any(part.startswith(".") for part in path.parts)


def _without_compression(name: str) -> str:
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in _COMPRESSED_ENDINGS else name


def _file_source(path: Path, json_key: str) -> Source:
    with reading(str(path)), open_binary(str(path)) as file:
        head = file.read(_HEAD_BYTES)
    for begins, what in ((b"PK\x03\x04", "a zip archive"), (b"ARROW1", "an Arrow file"), (b"\x89HDF", "an HDF5 file")):
        if head.startswith(begins):
            raise DataError(f"--input {path}: {what}, which is not read; unpack or convert it first")
    if head[257:262] == b"ustar":
        raise DataError(f"--input {path}: a tar archive, which is not read; unpack it and name the folder")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"--input {path}: UTF-16, not UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8")
    if head.startswith(b"PAR1"):
        if _compression_of(str(path)) is not None:
            raise DataError(f"--input {path}: Parquet inside another compression, which is not read; decompress it first")
        return Source("parquet", str(path))
    ending = Path(_without_compression(path.name)).suffix.lower()
    if ending == ".parquet":
        raise DataError(f"--input {path}: no Parquet file, as if cut short or of another kind; check that it is complete")
    return Source("jsonl" if ending in _JSON_LINES_ENDINGS or _holds_json_lines(path, json_key) else "text", str(path))


def _holds_json_lines(path: Path, json_key: str) -> bool:
    """Whether the first line with anything in it is a JSON object with that key, or it and the next are JSON objects."""
    lines: list[bytes] = []
    with reading(str(path)), open_binary(str(path)) as file:
        while len(lines) < 2 and (line := file.readline(_HEAD_BYTES)):
            begins_as_object = line.removeprefix(BOM).lstrip().startswith(b"{")
            if begins_as_object and not line.endswith(b"\n"):
                line += file.readline(MAX_DOCUMENT_BYTES)
            if begins_as_object:
                lines.append(line.removeprefix(BOM))
            elif line.strip(b" \t\r\n" + BOM):
                return False
    objects = [row for row in map(_json_object, lines) if row is not None]
    return bool(objects) and len(objects) == len(lines) and (len(objects) == 2 or json_key in objects[0])


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line.decode("utf-8"))
    except ValueError:
        return None
    except RecursionError:
        return {}  # whoever reads it says where it is
    return row if isinstance(row, dict) else None


def parse_json(line: str) -> Any:
    """A line of JSON, with some number for each integer: Python refuses those of more than 4,300 digits.

    `json.JSONDecodeError`, or `RecursionError` where it is nested too deep.
    """
    return json.loads(line, parse_int=len)


def _compression_of(path: str) -> str | None:
    with open(path, "rb") as file:
        head = file.read(6)
    return next((name for begins, name in _COMPRESSIONS.items() if head.startswith(begins)), None)


@contextlib.contextmanager
def open_binary(path: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where its first bytes say that it is compressed."""
    compression = _compression_of(path)
    if compression == "zstd":
        import pyarrow

        with pyarrow.input_stream(path, compression="zstd") as stream, io.BufferedReader(stream) as buffered:
            yield buffered
        return
    openers: dict[str | None, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    with openers.get(compression, open)(path, "rb") as file:
        yield file


@contextlib.contextmanager
def reading(name: str, errors: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Turns what a reader's library raises into a DataError that names the input."""
    caught: tuple[type[Exception], ...] = (*errors, EOFError, zlib.error, lzma.LZMAError)
    try:
        yield
    except DataError:
        raise
    except caught as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else error
        remedy = "check its name, and that it is complete"
        raise DataError(f"--input {name}: cannot be read: {detail}; {remedy}") from error
