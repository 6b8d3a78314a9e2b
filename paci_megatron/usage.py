"""What people asked for and cannot have."""

from __future__ import annotations

import tempfile
from pathlib import Path


class UsageError(ValueError):
    """A request that cannot work; the message names the value, the constraint and the remedy, in one line."""


def require(condition: bool, message: str) -> None:
    """``UsageError`` with that message unless the condition holds."""
    if not condition:
        raise UsageError(message)


def require_writable(flag: str, path: Path, makes_folder: bool = False) -> None:
    """``UsageError`` unless the file ``path`` that ``flag`` names can be written, which is seen before the work, not after.

    A file that is there is left as it is. Its folder must be there, unless it is to be made.
    """
    folder = path.parent
    while makes_folder and not folder.exists():
        folder = folder.parent
    require(not path.is_dir(), f"{flag} {path}: a folder; give the path of a file")
    require(folder.is_dir(), f"{flag} {path}: no folder {folder}; make it first")
    try:
        if path.exists():
            with open(path, "ab"):
                pass
        else:
            # Permissions do not tell: root has them all, on a read-only disk too.
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror}); give another path") from error
