"""The demo's corpus: the source files of Python's standard library, real text that every machine has."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Installed packages differ from machine to machine, and tests have files that are broken on purpose. The last two are
# tables of character codes, and a copy of the manual as string constants.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data"}
)


def standard_library() -> Path:
    """Where the running interpreter's standard library is, also from within a virtual environment."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[Path]:
    """The ``.py`` files under ``root`` outside the skipped folders, in an order that depends on their names only."""
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (path for path in relative if SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [root / path for path in sorted(kept, key=lambda path: path.as_posix())]


def documents(root: Path) -> Iterator[dict[str, str]]:
    """``{"text", "path"}`` of each source file that is UTF-8 and has text; ``path`` is relative to ``root``."""
    for path in source_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield {"text": text, "path": path.relative_to(root).as_posix()}


def write_corpus(root: Path, path: Path) -> tuple[int, int]:
    """Write the documents under ``root`` to ``path`` as JSON Lines; returns their number and their size in bytes.

    ``FileNotFoundError`` if there are none, as in a Python that comes without its sources.
    """
    num_documents = num_bytes = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for document in documents(root):
            file.write(json.dumps(document) + "\n")
            num_documents += 1
            num_bytes += len(document["text"].encode())
    if not num_documents:
        raise FileNotFoundError(f"{root}: no Python source files; run the demo with a Python that has its library's sources")
    return num_documents, num_bytes
