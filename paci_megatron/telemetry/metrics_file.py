"""A run's metrics, and its traces: files with one JSON object a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_OPENING = b'{"event": '  # how every line begins
_LONGEST = 1 << 20  # bytes; no line is as long


class MetricsFile:
    """Appends events to a file, each on one line as soon as it happens, so that a killed run loses at most its last.

    Telemetry never ends a training: where it cannot be written, a line on stderr says so, once, and each write tries again.
    """

    def __init__(self, path: str | Path) -> None:
        """The file and its folder are made with the first event."""
        self._path = Path(path)
        self._file: BinaryIO | None = None
        self._has_failed = False

    def write(self, event: str, **fields: Any) -> None:
        """Append ``{"event": event, **fields}``."""
        self.write_all([{"event": event, **fields}])

    def write_all(self, events: Iterable[dict[str, Any]]) -> None:
        """Append these, in one write; each has ``event`` first."""
        rest = "".join(json.dumps(event) + "\n" for event in events).encode()
        try:
            if self._file is None:
                self._file = open_to_append(self._path)
            while rest:  # a disk that is nearly full takes a part
                rest = rest[self._file.write(rest) :]
        except (OSError, ValueError) as error:
            if self._file is not None:
                self._file.close()
                self._file = None  # opened again, it is cut behind its last whole line
            if not self._has_failed:
                self._has_failed = True
                reason = error.strerror if isinstance(error, OSError) else error
                line = f"paci-megatron: {self._path} cannot be written ({reason}); training goes on, lines will be missing"
                print(line, file=sys.stderr, flush=True)


def open_to_append(path: Path) -> BinaryIO:
    """Opens ``path``, unbuffered, behind its last whole line: a kill may have left a part of one. Makes its folder.

    ``OSError`` if that cannot be done; ``ValueError`` from :func:`check_events`, and then the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        end = check_events(path)
        os.truncate(path, end)
    return open(path, "ab", buffering=0)


def check_events(path: Path) -> int:
    """``ValueError`` unless an existing file is one of ours, by its first and last lines; the length of its whole lines."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        first = file.readline(_LONGEST)
        begin = file.seek(max(size - _LONGEST, 0))
        last = file.read()
    end = last.rfind(b"\n") + 1
    cut = last[end:]
    if begin and not end:
        raise ValueError("its last line is longer than any of a metrics file")
    lines = [first, last[:end].splitlines()[-1]] if end else []
    for line in lines:
        try:
            is_event = line.startswith(_OPENING) and "event" in json.loads(line)
        except ValueError:
            is_event = False
        if not is_event:
            raise ValueError(f'the line {_shown(line)} is not a JSON object that begins with "event"')
    if not (cut.startswith(_OPENING) or _OPENING.startswith(cut)):
        raise ValueError(f"its end, {_shown(cut)}, is not one that a killed run leaves")
    return begin + end


def _shown(line: bytes) -> str:
    text = line[:40].decode(errors="replace").rstrip("\n")
    return repr(text if len(line) <= 40 else text + "...")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The events of a metrics file in order; see :func:`iter_metrics`."""
    return list(iter_metrics(path))


def iter_metrics(path: str | Path, is_wanted: Callable[[str], bool] = lambda line: True) -> Iterator[dict[str, Any]]:
    """The events in the wanted lines of a metrics file, in order; ``ValueError`` names the line that is not JSON.

    A last line without its end, as a kill may leave it, is ignored.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n") or not is_wanted(line):
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); every line must be one object") from error
