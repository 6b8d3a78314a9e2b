"""How curves look, in one place: colours that a colour-blind reader can tell apart, round ticks, quiet axes.

Figures are made without pyplot, so nothing is opened and nothing is left behind.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import Curve

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_HIDDEN = "_nolegend_"
_DEFAULT_FONT = "DejaVu Sans"  # Matplotlib brings it

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
        axes.plot(x, y, label=_HIDDEN if faint or label in named else label, **style)
        named.add(label)


def finish(axes: Axes) -> None:
    """Light grid, no box."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, axes: Axes, max_columns: int = 4) -> None:
    """A legend above the axes, of all lines that :func:`draw` has named, with their labels as they are."""
    lines: list[Artist] = [line for line in axes.get_lines() if line.get_label() != _HIDDEN]
    labels = [str(line.get_label()) for line in lines]
    # Matplotlib leaves labels out that begin with an underscore, so they are written afterwards.
    numbers = [str(number) for number in range(len(labels))]
    columns = min(max_columns, len(labels))
    legend = figure.legend(lines, numbers, loc="outside upper center", ncols=columns, frameon=False)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
        as_written(text)


def as_written(text: Text) -> None:
    """Writes a text of the user's as it is: no formulas between dollar signs, and glyphs from other fonts where needed."""
    text.set_parse_math(False)
    text.set_fontfamily([_DEFAULT_FONT, *_fonts_with(_missing(text.get_text(), [_DEFAULT_FONT]))])


def _missing(characters: str, families: Sequence[str]) -> str:
    """Those of the characters that none of the fonts has."""
    from matplotlib.font_manager import FontProperties, findfont

    return _missing_in(characters, [findfont(FontProperties(family=[family])) for family in families])


def _missing_in(characters: str, files: Sequence[str]) -> str:
    from matplotlib.font_manager import get_font

    fonts = [get_font(file) for file in files]
    return "".join(c for c in characters if c.isprintable() and not any(font.get_char_index(ord(c)) for font in fonts))


def _fonts_with(characters: str) -> list[str]:
    """The names of fonts of this machine that together have the characters, or as many of them as there are."""
    from matplotlib.font_manager import fontManager

    names: list[str] = []
    # Not the font of last resort, which has a box for everything.
    regular = [entry for entry in fontManager.ttflist if entry.weight == 400 and not entry.name.startswith("Last Resort")]
    for entry in sorted(regular, key=lambda entry: entry.fname) if characters else ():
        if entry.style == "normal" and len(left := _missing_in(characters, [entry.fname])) < len(characters):
            names.append(entry.name)
            characters = left
    return names


def check_glyphs(figure: Figure, path: Path) -> None:
    """``ValueError`` if a picture would have boxes in place of letters. An SVG leaves the letters to whoever shows it."""
    from matplotlib.text import Text

    if path.suffix.lower() == ".svg":
        return
    for text in figure.findobj(Text):
        lost = _missing(text.get_text(), text.get_fontfamily())
        if lost:
            raise ValueError(f"{text.get_text()}: no font of this machine has {lost[0]}; end the picture's name in .svg")


def add_inset(axes: Axes, curves: Sequence[Curve], share: float) -> Axes:
    """Axes in the upper right, where falling curves are not, for the last ``share`` of each curve's horizontal range; draw
    the curves into them. ``ValueError`` if there is nothing in that range.
    """
    end = max(max(curve.x) for curve in curves)
    begin = min(max(curve.x) - share * (max(curve.x) - min(curve.x)) for curve in curves)
    values = [value for _, x, y in curves for at, value in zip(x, y, strict=True) if at >= begin and math.isfinite(value)]
    if not values or begin == end:
        raise ValueError(f"--inset {share:g}: {'one point' if values else 'no finite value'} to enlarge; leave --inset out")
    margin = 0.05 * (max(values) - min(values)) or 0.01 * abs(values[0]) or 0.01
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

    ``ValueError`` if it is none of SUFFIXES or has letters that no font has; ``OSError`` if the file cannot be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: not a kind of picture; end it in {', '.join(SUFFIXES)}")
    check_glyphs(figure, path)
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[suffix]
    with matplotlib.rc_context({"svg.hashsalt": "paci", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # in an SVG: its letters are not drawn here
        figure.savefig(path, dpi=180, metadata=metadata)
