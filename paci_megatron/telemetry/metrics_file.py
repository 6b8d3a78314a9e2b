"""A run's metrics as one JSON object a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


class MetricsFile:
    """Appends events to a file, each on one line as soon as it happens, so that a killed run loses at most its last."""

    def __init__(self, path: str | Path) -> None:
        """Opens ``path`` for appending and makes its folder; ``OSError`` if that cannot be done."""
        self._stream = open_to_append(Path(path))

    def write(self, event: str, **fields: Any) -> None:
        """Append ``{"event": event, **fields}``."""
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()


def open_to_append(path: Path) -> TextIO:
    """Opens ``path`` behind its last whole line: a kill may have left a part of one. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        begin = stream.seek(max(size - (1 << 20), 0))
        stream.truncate(begin + stream.read().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The events of a metrics file in order; ``ValueError`` names the line that is not JSON.

    A last line without its end, as a kill may leave it, is ignored.
    """
    events = []
    text = Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); every line must be one object") from error
    return events
