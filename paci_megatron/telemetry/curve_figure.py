"""The picture of a set of runs' losses: which curves, on which axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import curves, plotting
from .curves import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Look:
    """What to draw: one of X_AXES, Y_AXES and SPLITS each, the points in the running mean, the share in an inset, which of
    the axes ``xy`` are logarithmic, and the limits of the vertical one.
    """

    x: str = "tokens"
    y: str = "loss"
    split: str = "validation"
    smooth: int = 1
    inset: float | None = None
    log: str = ""
    y_range: Sequence[float] | None = None
    title: str | None = None

    def validate(self) -> None:
        """``ValueError`` for the first value that cannot work with any runs."""
        if self.smooth < 1:
            raise ValueError(f"--smooth {self.smooth}: must be at least 1")
        if self.inset is not None and not 0 < self.inset < 1:
            raise ValueError(f"--inset {self.inset}: must be above 0 and below 1")
        if self.y_range is not None:
            low, high = self.y_range
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"--y-range {low:g} {high:g}: both must be numbers; give finite ones")
            if not low < high:
                raise ValueError(f"--y-range {low:g} {high:g}: LOW must be below HIGH; exchange them")
            if "y" in self.log and low <= 0:
                raise ValueError(f"--y-range {low:g} {high:g}: a logarithmic axis has no {low:g}; give LOW above 0")


def _check_values(drawn: Sequence[Curve], look: Look) -> None:
    """``ValueError`` if there is not one point that these axes can show."""
    finite = [(x, y) for curve in drawn for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    labels = ", ".join(dict.fromkeys(curve.label for curve in drawn))
    if not finite:
        raise ValueError(f"{labels}: every {look.split} {look.y} is NaN or infinite; there is nothing to draw")
    for axis, values in (("x", [x for x, _ in finite]), ("y", [y for _, y in finite])):
        if axis in look.log and max(values) <= 0:
            raise ValueError(f"--log {look.log}: {labels} has no value above 0 on the {axis} axis; leave --log out")


def make_figure(runs: list[Run], look: Look) -> Figure:
    """The picture of ``runs`` that ``look`` describes. ``ValueError`` if a run lacks what is to be drawn."""
    x, y, split = look.x, look.y, look.split
    raw = [curves.curve(run, x, y, split) for run in runs]
    smoothed = [curves.curve(run, x, y, split, look.smooth) for run in runs]
    _check_values(smoothed, look)
    label = {"tokens": "training tokens", "updates": "updates (optimizer steps)"}.get(x, "")
    if x == "time":
        unit, name = plotting.time_unit(max(max(curve.x) for curve in raw))
        clock = "time, evaluations and saves included" if any(run.is_wall_time for run in runs) else "training time"
        label = f"{clock} ({name})"
        raw, smoothed = _scaled(raw, unit), _scaled(smoothed, unit)
    figure, (axes,) = plotting.new_figure()

    def draw(where: Axes) -> None:
        if look.smooth > 1:
            plotting.draw(where, raw, faint=True)
        plotting.draw(where, smoothed, markers=split == "validation")

    draw(axes)
    axes.set(xlabel=label, ylabel=f"{'training' if split == 'train' else split} {y}")
    if look.title is not None:
        plotting.as_written(axes.set_title(look.title))
    if "x" in look.log:
        plotting.use_log_x(axes)
    elif x != "time":
        plotting.use_short_counts(axes)
    if look.y_range is not None:
        axes.set_ylim(*look.y_range)
    if "y" in look.log:
        plotting.use_log_ticks(axes)
    plotting.finish(axes)
    if look.inset is not None:
        draw(plotting.add_inset(axes, smoothed, look.inset))
    plotting.add_legend(figure, axes)
    return figure


def _scaled(drawn: list[Curve], unit: float) -> list[Curve]:
    return [Curve(label, [value / unit for value in x], y) for label, x, y in drawn]
