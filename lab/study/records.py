"""A run's folder: the command it was made with, the metrics of every attempt at it, and whether it is done."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

from paci_megatron.telemetry.metrics_file import read_metrics

from .arms import StudyError

Event = dict[str, Any]

_CLOCKS = ("train_s", "time_s")


class RunFolder:
    """Everything about one run is in its folder. An attempt at it writes ``metrics-I.jsonl``, I the iteration it starts
    after; a resumed run has several, and what an attempt did beyond the next one's start counts for nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def log(self) -> Path:
        """All that the commands printed."""
        return self.path / "log.txt"

    def claim(self, command: list[str]) -> None:
        """Make the folder for ``command``; ``StudyError`` if it holds a run of another."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "command.json"
        if not file.exists():
            _write_whole(file, json.dumps(command))
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != command:
            raise StudyError(
                f"{self.path}: it holds a run of another command, which cannot be continued with this one "
                f"({_first_difference(before, command)}). Use another --output, or remove that folder to run it again."
            )

    def checkpoint_iteration(self) -> int:
        """The iteration of the last whole checkpoint, 0 if there is none."""
        try:
            return int((self.path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0

    def begin_attempt(self) -> Path:
        """The metrics file of an attempt that starts from the last checkpoint, not there yet."""
        start = self.checkpoint_iteration()
        for begin, path in self._attempts():
            if begin >= start:  # it left no later checkpoint
                path.unlink()
        return self.path / f"metrics-{start:09d}.jsonl"

    def events(self) -> list[Event]:
        """The run's events as if it had never been interrupted: each iteration once, clocks counting on."""
        attempts = [(begin, read_metrics(path)) for begin, path in self._attempts()]
        merged: list[Event] = []
        for index, (begin, events) in enumerate(attempts):
            end = attempts[index + 1][0] if index + 1 < len(attempts) else None
            offsets = {clock: max((e[clock] for e in merged if clock in e), default=0.0) for clock in _CLOCKS}
            for event in events:
                if event["iteration"] > begin and (end is None or event["iteration"] <= end):
                    merged.append({k: v + offsets[k] if k in offsets else v for k, v in event.items()})
        return merged

    def drop_old_checkpoints(self) -> None:
        """Remove all checkpoints but the last."""
        last = self.checkpoint_iteration()
        for path in (self.path / "checkpoints").glob("iter_*"):
            if path.name.removeprefix("iter_").isdigit() and int(path.name.removeprefix("iter_")) < last:
                shutil.rmtree(path, ignore_errors=True)

    @property
    def is_done(self) -> bool:
        """Whether the run has ended well."""
        return (self.path / "done.json").exists()

    def finish(self, seconds: float) -> None:
        """The run has ended well; its last attempt took so many seconds of wall time."""
        _write_whole(self.path / "done.json", json.dumps({"last_attempt_s": round(seconds, 1)}))

    def _attempts(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem.removeprefix("metrics-")), path) for path in self.path.glob("metrics-*.jsonl"))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def _first_difference(before: list[str], now: list[str]) -> str:
    for index, (old, new) in enumerate(zip(before, now, strict=False)):
        if old != new:
            context = shlex.join(before[max(index - 1, 0) : index])
            return f"{context} {old} is now {context} {new}" if context.startswith("--") else f"{old} is now {new}"
    longer, word = (now, "added") if len(now) > len(before) else (before, "missing")
    return f"{word}: {shlex.join(longer[min(len(now), len(before)) :])}"
