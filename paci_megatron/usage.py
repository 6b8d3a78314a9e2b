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


def require_writable(flag: str, path: Path) -> None:
    """``UsageError`` unless the file ``path`` that ``flag`` names can be written, which is seen before the work, not after.

    A file that is there is left as it is.
    """
    require(not path.is_dir(), f"{flag} {path}: a folder; give the path of a file")
    require(path.parent.is_dir(), f"{flag} {path}: no folder {path.parent}; make it first")
    try:
        if path.exists():
            with open(path, "ab"):
                pass
        else:
            # Permissions do not tell: root has them all, on a read-only disk too.
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written ({error.strerror}); give another path") from error
