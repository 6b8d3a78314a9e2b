"""How curves look, in one place: colours that a colour-blind reader can tell apart, round ticks, quiet axes.

Figures are made without pyplot, so nothing is opened and nothing is left behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, without their yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (5, 1.6)), (0, (5, 1.6, 1, 1.6)), (0, (1.2, 1.2)))
_MARKERS = "os^DvPX"


def look(index: int) -> dict[str, Any]:
    """Matplotlib's arguments for the line of the run with this index: colour, dashes and marker all differ."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.8,
    }


def new_figure(num_axes: int = 1, size: tuple[float, float] = (7.2, 4.4)) -> tuple[Figure, list[Axes]]:
    """A figure of ``size`` inches with axes side by side that share the vertical one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, num_axes, sharey=True, squeeze=False)[0]
    return figure, list(axes)


def draw(axes: Axes, curves: Sequence[Curve], markers: bool = True, faint: bool = False) -> None:
    """A line for each curve. Curves of one label are runs of one kind: they look the same and have one legend entry.

    ``faint`` lines are for what is also drawn smoothed; they have no legend entry.
    """
    labels = list(dict.fromkeys(curve.label for curve in curves))
    named: set[str] = set()
    for label, x, y in curves:
        style = look(labels.index(label))
        if faint:
            style |= {"alpha": 0.25, "linewidth": 0.8, "linestyle": "-"}
        if not markers or faint:
            del style["marker"]
        axes.plot(x, y, label="_" if faint or label in named else label, **style)
        named.add(label)


def finish(axes: Axes) -> None:
    """Light grid, no box."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def add_inset(axes: Axes, curves: Sequence[Curve], share: float) -> Axes:
    """Axes in the upper right, where falling curves are not, for the last ``share`` of each curve's horizontal range; draw
    the curves into them.
    """
    end = max(max(curve.x) for curve in curves)
    begin = min(max(curve.x) - share * (max(curve.x) - min(curve.x)) for curve in curves)
    values = [value for _, x, y in curves for at, value in zip(x, y, strict=True) if at >= begin and math.isfinite(value)]
    margin = 0.05 * (max(values) - min(values)) or 0.01 * abs(values[0])
    inset = axes.inset_axes((0.42, 0.42, 0.56, 0.55))
    inset.set(xlim=(begin, end), ylim=(min(values) - margin, max(values) + margin))
    inset.xaxis.set_major_formatter(axes.xaxis.get_major_formatter())
    inset.grid(alpha=0.3)
    inset.tick_params(labelsize="small")
    axes.indicate_inset_zoom(inset, edgecolor="0.4")
    return inset


def perplexity_ticks(low: float, high: float) -> list[float]:
    """Round numbers within [low, high], denser where the range is less than a decade."""
    digits = (1, 2, 5) if high >= 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def use_log_ticks(axes: Axes) -> None:
    """A logarithmic vertical axis with its ticks at round numbers, written in full."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    axes.set_yscale("log")
    ticks = perplexity_ticks(*axes.get_ylim())
    if len(ticks) < 3:  # so narrow that the scale is almost linear
        low, high = axes.get_ylim()
        ticks = [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def short_count(value: float) -> str:
    """A number of tokens or updates in few characters: 1500 is 1.5k, 2e9 is 2B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.6g}{suffix}"
    return f"{value:.6g}"


def use_short_counts(axes: Axes) -> None:
    """Write the horizontal axis in few characters, as :func:`short_count` does."""
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))


def use_log_x(axes: Axes) -> None:
    """A logarithmic horizontal axis with its ticks at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    use_short_counts(axes)


def time_unit(seconds: float) -> tuple[float, str]:
    """The length in seconds and the name of the unit in which a time like this is easy to read."""
    for unit, name in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * unit:
            return unit, name
    return 1.0, "seconds"


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the kind that ``path`` ends in; the same curves give the same bytes.

    ``ValueError`` if it is none of SUFFIXES; ``OSError`` if the file cannot be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: not a kind of picture; end it in {', '.join(SUFFIXES)}")
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    with matplotlib.rc_context({"svg.hashsalt": "paci", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=180, metadata=metadata)
