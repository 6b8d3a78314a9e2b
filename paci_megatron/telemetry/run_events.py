"""A run's events as if it had never been interrupted: a training that is resumed goes on in the same file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .metrics_file import read_metrics

Event = dict[str, Any]


def read_run_events(path: Path) -> list[Event]:
    """The events of the metrics file ``path``, each iteration once, with ``train_s`` counting on.

    Of iterations that were trained again only the last time is left. ``ValueError`` if ``path`` is no metrics file.
    """
    try:
        return join(read_metrics(path))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics file; name one that --paci-metrics-file has written") from error


def slack_choices(path: Path, num_stages: int) -> list[tuple[int, tuple[int, ...]]]:
    """What a run with ``--paci-extra-in-flight auto`` chose: after which iteration, and the slack of each link from there.

    ``ValueError`` if the metrics file has none, or of another number of stages.
    """
    choices = [(event["iteration"], tuple(event["slack"])) for event in named(read_run_events(path), "slack")]
    if not choices:
        raise ValueError(f"{path}: no choice of a run with --paci-extra-in-flight auto is in it")
    if any(len(slack) != num_stages - 1 for _, slack in choices):
        raise ValueError(f"{path}: chosen for {len(choices[0][1]) + 1} stages, and here are {num_stages}")
    return choices


def named(events: Iterable[Event], name: str) -> list[Event]:
    """The events of this name, in order."""
    return [event for event in events if event["event"] == name]


def join(events: Iterable[Event]) -> list[Event]:
    """See :func:`read_run_events`. A process that has logged nothing changes nothing."""
    kept: list[Event] = []
    for process in _by_process(events):
        if not any(event["event"] in ("train", "evaluation") for event in process):
            kept = kept or process
            continue
        start = _start(process)
        offset_s = _seconds_at(start, named(kept, "train"))
        kept = [event for event in kept if event["iteration"] < start + (event["event"] != "run")]
        for event in process:
            if event["event"] == "run" or event["iteration"] > start:
                kept.append(event | {"train_s": event["train_s"] + offset_s} if "train_s" in event else event)
    return kept


def _by_process(events: Iterable[Event]) -> list[list[Event]]:
    """The events of each process that has written to the file. It begins with ``run``. In a file of an earlier version it
    shows in the clocks, which start anew: ``time_s``, and that of training in the time since the last log line.
    """
    processes: list[list[Event]] = [[]]
    undecided: list[Event] = []  # without a clock, waiting for the next event that has one
    time_s = train_s = 0.0
    for event in events:
        undecided.append(event)
        if event["event"] == "run":
            processes[-1] += undecided[:-1]
            processes.append([event])
            time_s = train_s = 0.0
        elif event["event"] in ("train", "evaluation"):
            began_s = math.inf
            if event["event"] == "train":
                began_s = event["train_s"] - event["iterations"] * event["ms_per_iteration"] / 1000
            if event["time_s"] < time_s or began_s < train_s / 2:
                processes.append([])
            processes[-1] += undecided
            time_s = event["time_s"]
            train_s = event["train_s"] if event["event"] == "train" else train_s
        else:
            continue
        undecided = []
    processes[-1] += undecided
    return [process for process in processes if process]


def _start(process: list[Event]) -> int:
    """The iteration after which a process started."""
    if process[0]["event"] == "run":
        return int(process[0]["iteration"])
    first = next(event for event in process if event["event"] in ("train", "evaluation"))
    return int(first["iteration"]) - int(first.get("iterations", 0))


def _seconds_at(iteration: int, train: list[Event]) -> float:
    """The training time after ``iteration``, on a straight line through the log lines beside it."""
    if not iteration or not train:
        return 0.0
    known = [(0, 0.0), *((event["iteration"], event["train_s"]) for event in train)]
    after = next((index for index, (there, _) in enumerate(known) if there >= iteration), len(known) - 1)
    (x0, y0), (x1, y1) = known[after - 1], known[after]
    return float(y0 + (y1 - y0) * (iteration - x0) / (x1 - x0))
