"""A run's losses as points, from its metrics file or its TensorBoard folder, and what can be drawn from them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from .metrics_file import read_metrics
from .tensorboard_file import read_event_folder

SPLITS = ("train", "validation")
X_AXES = ("tokens", "updates", "time")
Y_AXES = ("loss", "perplexity")


class Point(NamedTuple):
    """The loss (nats per token) after so many updates, tokens and seconds of training; tokens None if unknown."""

    update: int
    tokens: int | None
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run's points, in order. ``is_wall_time``: the seconds include evaluations and saves."""

    label: str
    train: list[Point]
    validation: list[Point]
    is_wall_time: bool = False


class Curve(NamedTuple):
    """A line to draw."""

    label: str
    x: list[float]
    y: list[float]


def read_run(path: Path, label: str, seq_length: int | None = None) -> Run:
    """The run whose metrics ``path`` holds: a file of --paci-metrics-file, or a folder of --tensorboard-dir.

    ``seq_length`` is for a folder in which no training has written its arguments: tokens are samples times this length.
    ``ValueError`` if there is nothing of the kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name a metrics file, or a TensorBoard folder")
    run = _from_tensorboard(path, label, seq_length) if path.is_dir() else _from_metrics(path, label)
    if not run.train and not run.validation:
        raise ValueError(f"{path}: no losses in it; name the metrics of a training that has logged something")
    return run


def curve(run: Run, x: str, y: str, split: str, smooth: int = 1) -> Curve:
    """One of ``run``'s curves. Time is in seconds; ``smooth`` is the number of points in the running mean of the loss.

    ``ValueError`` if the run has no such points, or does not say how many tokens they are.
    """
    points = run.train if split == "train" else run.validation
    if not points:
        other = next(name for name in SPLITS if name != split)
        raise ValueError(f"{run.label}: no {split} losses in it; choose --split {other}, or leave the run out")
    if x == "tokens":
        if any(point.tokens is None for point in points):
            raise ValueError(
                f"{run.label}: does not say how many tokens it has seen; choose another --x, or add --seq-length"
            )
        xs = [float(point.tokens or 0) for point in points]
    else:
        xs = [float(point.update) if x == "updates" else point.seconds for point in points]
    losses = running_mean([point.loss for point in points], smooth)
    return Curve(run.label, xs, [_perplexity(loss) for loss in losses] if y == "perplexity" else losses)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """The mean over ``count`` values around each. At the start, where losses fall fast, over as many before as after; at the
    end over those there are.
    """
    means = []
    for index in range(len(values)):
        reach = min(count // 2, index)
        means.append(fmean(values[index - reach : index + reach + 1]))
    return means


def _from_metrics(path: Path, label: str) -> Run:
    """A metrics file's run. A training that was resumed continues in the same file, from an earlier iteration."""
    train: list[Point] = []
    validation: list[Point] = []
    offset_s = 0.0
    try:
        processes = _by_process(event for event in read_metrics(path) if event["event"] in ("train", "evaluation"))
        for events in processes:
            start = _start(events)
            offset_s = _seconds_at(start, train)
            train = [point for point in train if point.update <= start]
            validation = [point for point in validation if point.update <= start]
            train += [_point(event, offset_s) for event in events if event["event"] == "train"]
            validation += _mean_evaluations(events, offset_s)
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics file; name one that --paci-metrics-file has written") from error
    return Run(label, train, validation)


def _by_process(events: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The events of each process that has written to the file. Its clocks start anew: ``time_s``, and that of training,
    which shows in the time since the last log line.
    """
    processes: list[list[dict[str, Any]]] = []
    time_s = train_s = 0.0
    for event in events:
        began_s = math.inf
        if event["event"] == "train":
            began_s = event["train_s"] - event["iterations"] * event["ms_per_iteration"] / 1000
        if not processes or event["time_s"] < time_s or began_s < train_s / 2:
            processes.append([])
        processes[-1].append(event)
        time_s = event["time_s"]
        train_s = event["train_s"] if event["event"] == "train" else train_s
    return processes


def _start(events: list[dict[str, Any]]) -> int:
    """The iteration after which a process started."""
    first = events[0]
    return int(first["iteration"]) - int(first.get("iterations", 0))


def _seconds_at(update: int, points: list[Point]) -> float:
    """The training time after ``update`` updates, on a straight line through the points beside it."""
    if not update or not points:
        return 0.0
    known = [(0, 0.0), *((point.update, point.seconds) for point in points)]
    after = next((index for index, (there, _) in enumerate(known) if there >= update), len(known) - 1)
    (x0, y0), (x1, y1) = known[after - 1], known[after]
    return y0 + (y1 - y0) * (update - x0) / (x1 - x0)


def _point(event: dict[str, Any], offset_s: float) -> Point:
    return Point(event["iteration"], event["tokens"], offset_s + event["train_s"], event["loss"])


def _mean_evaluations(events: list[dict[str, Any]], offset_s: float) -> list[Point]:
    """The evaluations on validation data: after the last iteration Megatron makes two, on different samples."""
    chosen = [e for e in events if e["event"] == "evaluation" and "test set" not in e.get("prefix", "")]
    points = []
    for _, group in itertools.groupby(chosen, key=lambda event: event["iteration"]):
        same = [_point(event, offset_s) for event in group]
        points.append(same[0]._replace(loss=fmean(point.loss for point in same)))
    return points


def _from_tensorboard(folder: Path, label: str, seq_length: int | None) -> Run:
    """A TensorBoard folder's run. Its only clock is the wall's."""
    events = read_event_folder(folder)
    written = re.fullmatch(r"\d+", events.texts.get("seq_length/text_summary", ""))
    length = seq_length or (int(written[0]) if written else None)
    loss = events.scalars.get("lm loss", [])
    begin_s = loss[0].wall_s if loss else 0.0

    def points(tag: str) -> list[Point]:
        scalars, samples = events.scalars.get(tag, []), events.scalars.get(f"{tag} vs samples", [])
        counts: list[int | None] = [None] * len(scalars)
        if length is not None and len(samples) == len(scalars):
            counts = [scalar.step * length for scalar in samples]
        made = [
            Point(scalar.step, count, scalar.wall_s - begin_s, scalar.value)
            for scalar, count in zip(scalars, counts, strict=True)
        ]
        return _without_overlap(made)

    return Run(label, points("lm loss"), points("lm loss validation"), is_wall_time=True)


def _without_overlap(points: list[Point]) -> list[Point]:
    """A resumed run's points replace those it has trained again. Of points of one update the first stays: the others are
    evaluations after the end.
    """
    kept: list[Point] = []
    for point in points:
        if kept and point.update == kept[-1].update:
            continue
        while kept and kept[-1].update >= point.update:
            kept.pop()
        kept.append(point)
    return kept
