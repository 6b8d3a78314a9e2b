"""The report's figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from paci_megatron.telemetry.plotting import COLOURS, finish, save

from . import statistics as st
from .analysis import Analysis
from .arms import Arm

_FLUSH = "#555555"


def write_figures(analysis: Analysis, report: dict[str, Any], folder: Path) -> list[str]:
    """Write every figure that the finished runs allow; returns the file names."""
    names: list[str] = []
    if not any(analysis.main_paci(batch_size) for batch_size in analysis.batch_sizes):
        return []
    for name, draw in (
        ("loss_by_tokens.png", _loss_by_tokens),
        ("perplexity_by_time.png", _perplexity_by_time),
        ("throughput.png", _throughput),
    ):
        figure = draw(analysis, report)
        if figure is not None:
            save(figure, folder / name)
            names.append(name)
    return names


def _style(analysis: Analysis, arm: Arm) -> dict[str, Any]:
    if arm.is_flush:
        return {"color": _FLUSH, "linestyle": "--", "linewidth": 1.6}
    counts = analysis.counts(arm.batch_size)
    return {"color": COLOURS[counts.index(arm.microbatches_per_update) % len(COLOURS)], "linewidth": 1.6}


def _axes(count: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _panels(analysis: Analysis, height: float = 4.6) -> tuple[Any, list[Any]]:
    count = len(analysis.batch_sizes)
    figure, axes = _axes(count, (6.2 * count, height))
    for axis, batch_size in zip(axes, analysis.batch_sizes, strict=True):
        axis.set_title(f"batch {batch_size}")
        finish(axis)
    return figure, axes


def _loss_by_tokens(analysis: Analysis, report: dict[str, Any]) -> Any:
    """Validation loss of the main arms, mean over seeds, with the end enlarged."""
    figure, axes = _panels(analysis)
    for axis, batch_size in zip(axes, analysis.batch_sizes, strict=True):
        reference = analysis.reference(Arm("1f1b", 1, batch_size))
        arms = [*([reference] if reference else []), *analysis.main_paci(batch_size)]
        inset = axis.inset_axes((0.5, 0.48, 0.47, 0.4))
        for arm in arms:
            curve = analysis.curve(arm)
            tokens, losses = [point.tokens / 1e6 for point in curve], [point.loss for point in curve]
            axis.plot(tokens, losses, label=arm.title, **_style(analysis, arm))
            tail = max(2, len(curve) // 3)
            inset.plot(tokens[-tail:], losses[-tail:], **_style(analysis, arm))
        inset.tick_params(labelsize=7)
        inset.grid(alpha=0.3)
        axis.set(xlabel="tokens (millions)", ylabel="validation loss, mean over seeds")
        axis.legend(frameon=False, loc="lower left", fontsize=8)
    return figure


def _perplexity_by_time(analysis: Analysis, report: dict[str, Any]) -> Any:
    """Perplexity against time for PACI and flush with the same number of micro-batches; arrows show the speed-ups."""
    figure, axes = _panels(analysis)
    for axis, batch_size in zip(axes, analysis.batch_sizes, strict=True):
        rows = [row for row in report["thresholds"] if row["batch_size"] == batch_size]
        for arm in analysis.main_paci(batch_size):
            style, count = _style(analysis, arm), arm.microbatches_per_update
            _plot_perplexity(axis, analysis.curve(arm), label=arm.title, **style)
            if flush := analysis.flush_curve(batch_size, count):
                label = f"1F1B-flush a={count}"
                _plot_perplexity(axis, flush, label=label, **style | {"linestyle": "--", "linewidth": 1.2})
            own = [row for row in rows if row["microbatches_per_update"] == count and row["speedup"] is not None]
            # One arrow an arm, each at a perplexity of its own, so that they do not overlap.
            if own:
                place = analysis.main_paci(batch_size).index(arm)
                _arrow(axis, own[-1 - min(place, len(own) - 1)], style["color"])
        axis.set(xlabel=f"training time (s), {analysis.timing}", ylabel="validation perplexity", yscale="log")
        axis.set_xlim(left=0)
        axis.legend(frameon=False, fontsize=8)
    return figure


def _plot_perplexity(axis: Any, curve: st.Curve, **style: Any) -> None:
    axis.plot([point.seconds for point in curve], [math.exp(point.loss) for point in curve], **style)


def _arrow(axis: Any, row: dict[str, Any], colour: str) -> None:
    begin, end, height = row["flush_seconds"], row["seconds"], row["perplexity"]
    arrow = {"arrowstyle": "->", "color": colour}
    axis.annotate("", xy=(end, height), xytext=(begin, height), arrowprops=arrow)
    place = ((begin + end) / 2, height)
    offset = {"textcoords": "offset points", "xytext": (0, 3), "ha": "center", "fontsize": 8, "color": colour}
    axis.annotate(f"{row['speedup']:.2f}x", xy=place, **offset)


def _throughput(analysis: Analysis, report: dict[str, Any]) -> Any:
    """Speed and activations held against the number of micro-batches."""
    rows = report["throughput"]
    if not rows:
        return None
    figure, (speed, held) = _axes(2, (11, 4.2))
    for index, batch_size in enumerate(analysis.batch_sizes):
        mine = [row for row in rows if row["batch_size"] == batch_size]
        counts = [row["microbatches_per_update"] for row in mine]
        for schedule, line, marker in (("flush", "--", "o"), ("paci", "-", "s")):
            style = {"color": COLOURS[index % len(COLOURS)], "linestyle": line, "marker": marker}
            name = f"{'PACI' if schedule == 'paci' else '1F1B-flush'}, batch {batch_size}"
            values = [row[f"{schedule}_tokens_per_second"] for row in mine]
            speed.plot(counts, [math.nan if v is None else v for v in values], label=name, **style)
            held.plot(counts, [row[f"{schedule}_held_sequences"] for row in mine], label=name, **style)
    speed.set(ylabel=f"tokens/s, {analysis.timing}")
    held.set(ylabel="sequences the first stage holds, computed")
    for axis in (speed, held):
        axis.set(xlabel="micro-batches per update")
        axis.set_ylim(bottom=0)
        finish(axis)
        axis.legend(frameon=False, fontsize=8)
    return figure
