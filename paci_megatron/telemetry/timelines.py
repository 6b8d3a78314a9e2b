"""Timelines of schedules as the kind of file that its name says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paci_megatron.simulate.export import COLOURS, LABELS, WAITING, WAITING_COLOUR, to_chrome_trace, to_csv, to_html
from paci_megatron.simulate.render import Timelines, render_timelines
from paci_megatron.usage import require

from .plotting import save

ENDINGS = (".txt", ".csv", ".json", ".html", ".png")


def check_ending(path: Path) -> None:
    """``UsageError`` unless :func:`write_timelines` can write a file of that name."""
    require(path.suffix in ENDINGS, f"--timeline {path}: {path.suffix or 'no ending'}; choose {', '.join(ENDINGS)}")


def write_timelines(
    path: Path, timelines: Timelines, table: Sequence[Sequence[str]] = (), slot_s: float | None = None
) -> None:
    """Draw ``timelines``: in text with ``slot_s`` a column, in HTML below ``table``. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".png":
            _plot(path, timelines)
            return
        case ".txt":
            text = render_timelines(timelines, slot_s=slot_s)
        case ".csv":
            text = to_csv(timelines)
        case ".json":
            text = to_chrome_trace(timelines)
        case _:
            text = to_html(timelines, table)
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _plot(path: Path, timelines: Timelines) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    num_stages = len(next(iter(timelines.values())))
    figure = Figure(figsize=(12, 0.8 + len(timelines) * (0.5 + 0.2 * num_stages)), layout="constrained")
    rows = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, stages) in zip(rows, timelines.items(), strict=True):
        for stage, spans in enumerate(stages):
            place = (stage - 0.45, 0.9)
            waits = [((span.start_s - span.waiting_s) * 1000, span.waiting_s * 1000) for span in spans]
            axes.broken_barh(waits, place, facecolors=WAITING_COLOUR)
            bars = [(span.start_s * 1000, (span.end_s - span.start_s) * 1000) for span in spans]
            colours = [COLOURS[span.action.kind] for span in spans]
            axes.broken_barh(bars, place, facecolors=colours, edgecolor="white", linewidth=0.3)
        axes.set(ylabel="stage", ylim=(num_stages - 0.5, -0.5))
        axes.set_title(title, loc="left")
        axes.margins(x=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.locator_params(axis="y", integer=True)
    rows[-1].set_xlabel("time (ms)")
    drawn = [span for stages in timelines.values() for spans in stages for span in spans]
    used = {span.action.kind for span in drawn if span.end_s > span.start_s}
    colours_of = {LABELS[kind]: colour for kind, colour in COLOURS.items() if kind in used}
    handles = [Patch(color=colour, label=label) for label, colour in colours_of.items()]
    if any(span.waiting_s for span in drawn):
        handles.append(Patch(color=WAITING_COLOUR, label=WAITING))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    save(figure, path)
