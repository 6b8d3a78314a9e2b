"""A run's losses as points, from its metrics file or its TensorBoard folder, and what can be drawn from them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from .run_events import Event, named, read_run_events
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


def named_path(value: str) -> tuple[str | None, Path]:
    """The label, None if there is none, and the path of ``[LABEL=]PATH``."""
    label, separator, rest = value.partition("=")
    return (label, Path(rest)) if separator and not Path(value).exists() else (None, Path(value))


def read_run(path: Path, label: str, seq_length: int | None = None) -> Run:
    """The run whose metrics ``path`` holds: a file of --paci-metrics-file, or a folder of --tensorboard-dir.

    ``seq_length`` is for a folder in which no training has written its arguments: tokens are samples times this length.
    ``ValueError`` if there is nothing of the kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; name a metrics file, or a TensorBoard folder")
    run = _from_tensorboard(path, label, seq_length) if path.is_dir() else run_of(read_run_events(path), label)
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


def run_of(events: Sequence[Event], label: str) -> Run:
    """The run that has these events, joined as by :func:`~paci_megatron.telemetry.run_events.join`."""
    return Run(label, [_point(event) for event in named(events, "train")], _mean_evaluations(events))


def _point(event: Event) -> Point:
    return Point(event["iteration"], event["tokens"], event["train_s"], event["loss"])


def _mean_evaluations(events: Sequence[Event]) -> list[Point]:
    """The evaluations on validation data: after the last iteration Megatron makes two, on different samples."""
    chosen = [event for event in named(events, "evaluation") if "test set" not in event.get("prefix", "")]
    points = []
    for _, group in itertools.groupby(chosen, key=lambda event: event["iteration"]):
        same = [_point(event) for event in group]
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
