"""Output files that appear all together or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from paci_megatron.data import DataError


class Staging:
    """A directory `PREFIX.partial` beside the outputs: they are written there, and renamed when complete.

    Leaving the context removes it. A killed run leaves it behind; the next with that prefix starts it afresh.
    Entering raises DataError if it cannot be created, or while another run with the same prefix is under way.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._directory = Path(f"{prefix}.partial")
        self._created: list[Path] = []

    def __enter__(self) -> Staging:
        with self.writing():
            self._make_parents(self._directory)
            self._directory.mkdir(exist_ok=True)
            self._lock = open(self._directory / ".lock", "w")
            try:
                # Unlike flock's, this lock is not inherited by worker processes: it ends with this process.
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = "another run is writing it; wait for it, or name another"
                raise DataError(f"--output-prefix {self._prefix}: {message}") from error
            for leftover in self._directory.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != ".lock":
                    leftover.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Closed first: a network file system keeps the name of an open file, and with it the directory.
        self._lock.close()
        shutil.rmtree(self._directory)
        if error is not None:
            self._remove_created()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an operating system's error in the block into a DataError; for use around writes only."""
        try:
            yield
        except OSError as error:
            self._remove_created()
            path = error.filename2 or error.filename or self._directory
            remedy = "choose a writable directory with enough room"
            message = f"--output-prefix {self._prefix}: cannot write {path}: {error.strerror}; {remedy}"
            raise DataError(message) from error

    def path(self, suffix: str) -> Path:
        """Where to write what is to be published as PREFIX + `suffix`, which may have one `/`."""
        staged = self._directory / suffix
        staged.parent.mkdir(exist_ok=True)
        return staged

    def write(self, suffix: str, content: bytes) -> Path:
        """Writes a whole file to `path(suffix)`, and returns that path."""
        with self.writing():
            path = self.path(suffix)
            path.write_bytes(content)
        return path

    def publish(self) -> None:
        """Renames everything into place, `.idx` last. DataError if that fails.

        Earlier `.idx` go first: killed within these few renames, a run leaves no data set rather than one
        whose index belongs to other data.
        """
        staged = (path for path in self._directory.rglob("*") if path.is_file() and path.name != ".lock")
        files = [(path, Path(f"{self._prefix}{path.relative_to(self._directory)}")) for path in staged]
        files.sort(key=lambda pair: (pair[1].suffix == ".idx", pair[1]))
        with self.writing():
            for path, final in files:
                _flush_to_disk(path)
                self._make_parents(final)
                if final.is_dir():
                    raise IsADirectoryError(0, "it is a directory", str(final))
            for _, final in files:
                if final.suffix == ".idx":
                    final.unlink(missing_ok=True)
            for path, final in files:
                os.replace(path, final)

    def _make_parents(self, path: Path) -> None:
        for parent in reversed([parent for parent in path.parents if not parent.exists()]):
            parent.mkdir(exist_ok=True)
            self._created.append(parent)

    def _remove_created(self) -> None:
        for directory in reversed(self._created):
            # Not if something else was put there meanwhile.
            if directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()


def _flush_to_disk(path: Path) -> None:
    """Else a machine that loses power after the rename can come back with an empty file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
