"""The runs that a report shows: a metrics file each, and the trace that belongs to it if there is one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from paci_megatron.schedule.schedules import max_drift
from paci_megatron.telemetry import curves
from paci_megatron.telemetry.run_events import Event, named, read_run_events
from paci_megatron.telemetry.trace_report import TraceReport

SCHEDULE_NAMES = {"1f1b": "1F1B-flush", "paci": "PACI", "paci-v": "PACI-V"}
MOST_TRACED = 200
"""Iterations that are read of a trace: those of days would take minutes, and more memory than there is."""
_TRACE = re.compile(r"stage-\d+\.jsonl")


@dataclass(frozen=True)
class ReportedRun:
    """A run's events, joined, and its trace, or why there is none."""

    label: str
    path: Path
    events: list[Event]
    trace: TraceReport | None
    no_trace: str = ""

    @cached_property
    def headers(self) -> list[Event]:
        """What each process that has written to the file said first; empty in a file of an earlier version."""
        return named(self.events, "run")

    @cached_property
    def header(self) -> Event:
        """The last process's."""
        return self.headers[-1] if self.headers else {}

    @cached_property
    def schedule(self) -> str:
        """``paci``, ``1f1b``, or empty where nothing says it."""
        return next((str(event["schedule"]) for event in self.events if "schedule" in event), "")

    @cached_property
    def drains(self) -> list[list[Event]]:
        """What each stage had measured at each drain, as far back as there were as many stages as at the end."""
        found = [event["stages"] for event in named(self.events, "drain") if event["stages"]]
        return [stages for stages in found if len(stages) == len(found[-1])]

    @cached_property
    def num_stages(self) -> int | None:
        """N, or None where nothing says it."""
        found = self.header.get("num_stages") or (len(self.drains[-1]) if self.drains else None)
        return found or (self.trace.stretch.num_stages if self.trace else None)

    @cached_property
    def microbatches_per_update(self) -> int | None:
        """The a, or None where nothing says it."""
        found: int | None = self.header.get("microbatches_per_update")
        return found or (self.trace.stretch.microbatches_per_update if self.trace else None)

    @cached_property
    def curves(self) -> curves.Run:
        """Its losses."""
        return curves.run_of(self.events, self.label)

    @property
    def iterations(self) -> int:
        """The last one that anything is known of."""
        return max((event["iteration"] for event in self.events), default=0)

    def drift_bounds(self) -> list[int] | None:
        """Each stage's, in updates; None where the metrics file does not say the a."""
        n, a = self.num_stages, self.microbatches_per_update
        if n is None or a is None:
            return None
        if self.schedule == "1f1b":
            return [0] * n
        return [max(max_drift(stage, n, a, slack) for slack in self.slacks()) for stage in range(n)]

    def slacks(self) -> list[tuple[int, ...]]:
        """Of the links, as given first and as chosen since."""
        return [tuple(self.header.get("slack", ())), *(tuple(event["slack"]) for event in named(self.events, "slack"))]


def read_runs(named_paths: Sequence[tuple[str | None, Path]]) -> list[ReportedRun]:
    """The runs in these metrics files and folders, each with its label; None to name it by its schedule or its path.

    ``ValueError`` names what cannot be read.
    """
    files = [(label, file) for label, path in named_paths for file in metrics_files(path)]
    read = [(label, file, read_run_events(file)) for label, file in files]
    for _, file, events in read:
        if not events:
            raise ValueError(f"{file}: nothing in it; name the metrics file of a training that has logged something")
    bare = [_schedule_name(events) for label, _, events in read if label is None]
    distinct = len(set(bare)) == len(bare) and "" not in bare
    runs = []
    for label, file, events in read:
        trace, why = _read_trace(file, events)
        chosen = label or (_schedule_name(events) if distinct else _short_name(file, [path for _, path in files]))
        runs.append(ReportedRun(chosen, file, events, trace, why))
    return runs


def metrics_files(path: Path) -> list[Path]:
    """``path`` itself, or the metrics files that the folder holds; ``ValueError`` if there are none."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name a metrics file, or a folder that holds one")
    if not path.is_dir():
        return [path]
    found = [
        file
        for file in sorted(path.glob("*.jsonl"), key=lambda file: file.stem)
        if not _TRACE.fullmatch(file.name) and _is_ours(file)
    ]
    if not found:
        raise ValueError(f"{path}: no metrics file in it; name a file that --paci-metrics-file has written, or its folder")
    return found


def _is_ours(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(10) == b'{"event": '


def _schedule_name(events: Sequence[Event]) -> str:
    schedule = next((str(event["schedule"]) for event in events if "schedule" in event), "")
    return SCHEDULE_NAMES.get(schedule, schedule)


def _short_name(file: Path, files: Sequence[Path]) -> str:
    return file.stem if [other.stem for other in files].count(file.stem) == 1 else str(file)


def _read_trace(file: Path, events: Sequence[Event]) -> tuple[TraceReport | None, str]:
    """The trace of this run, where its header says or beside it; or why there is none."""
    told: Any = next((event["trace_dir"] for event in reversed(events) if event.get("trace_dir")), None)
    beside = [file.parent, file.with_name(f"{file.stem}-trace"), file.with_name("trace")]
    # The file's neighbours first: it may have been copied here, from another machine, with all that belongs to it.
    places = [*([file.with_name(Path(told).name), Path(told)] if told else []), *beside]
    folder = next((place for place in places if (place / "stage-0.jsonl").is_file()), None)
    if folder is None:
        where = f"its trace is not in {told} any more" if told else "it was not traced (--paci-trace-dir)"
        return None, where
    try:
        return TraceReport(folder, enough=MOST_TRACED), ""
    except (ValueError, KeyError, OSError) as error:
        return None, f"its trace cannot be used: {error}"
