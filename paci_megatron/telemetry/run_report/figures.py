"""The figures over a run's time: losses, throughput, gradient norms. As data for plotly.js, which draws them in the page.

A colour is a name after ``@``, which the page's style gives a value, one for light and one for dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from paci_megatron.telemetry import curves, plotting
from paci_megatron.telemetry.speed import log_intervals

from .measures import compare, norms, speed, thin
from .runs import ReportedRun

Plot = dict[str, Any]
"""A plot's ``data`` and ``layout`` for plotly.js."""


@dataclass
class Figure:
    """Plots beside each other with what is said about them. With several ``variants`` the reader chooses one.

    ``notes`` are what is missing, and why.
    """

    name: str
    title: str
    caption: str
    variants: dict[str, list[Plot]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    height: int = 340

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not any(plot["data"] for plots in self.variants.values() for plot in plots)


def plot(data: list[Plot], x: str, y: str, **layout: Any) -> Plot:
    """A plot with these traces and titles of the axes."""
    axes: Plot = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, more in layout.items():
        axes[name] = {**axes.get(name, {}), **more} if isinstance(more, dict) else more
    return {"data": data, "layout": axes}


def plain(text: str) -> str:
    """A name for plotly.js, which takes texts for HTML."""
    return html.escape(text, quote=False)


def line(index: int, name: str, x: Sequence[float], y: Sequence[float | None], **more: Any) -> Plot:
    """The line of the run with this index."""
    style = {"color": f"@run-{index}", "width": 2}
    return {"type": "scatter", "mode": "lines", "name": plain(name), "x": list(x), "y": list(y), "line": style, **more}


def _most_points(runs: Sequence[ReportedRun]) -> int:
    """Of a line, so that a page of many runs stays small: 2000 of up to four."""
    return 8000 // max(4, len(runs))


_VARIANTS = {
    "Validation perplexity": ("validation", "perplexity", "validation perplexity"),
    "Validation loss": ("validation", "loss", "validation loss (nats per token)"),
    "Training loss": ("train", "loss", "training loss (nats per token)"),
}


def losses(runs: Sequence[ReportedRun]) -> Figure:
    """Loss and perplexity against training time and against tokens."""
    figure = Figure(
        "losses",
        "Loss and perplexity, against time and against tokens",
        "First what a run has reached after so much training time, evaluations and saves left out, then the same after so "
        "many tokens, where the schedules differ by nothing but the weights that a backward meets. Lower is better.",
    )
    for name, (split, y, title) in _VARIANTS.items():
        plots = [_loss_plot(runs, x, y, split, title) for x in ("time", "tokens")]
        if any(plot["data"] for plot in plots):
            figure.variants[name] = plots
    for run in runs:
        if not run.curves.validation:
            figure.notes.append(f"{run.label}: no evaluation on validation data in its metrics file.")
        if not run.curves.train:
            figure.notes.append(f"{run.label}: no training loss in its metrics file.")
    return figure


def _loss_plot(runs: Sequence[ReportedRun], x: str, y: str, split: str, title: str) -> Plot:
    drawn = [
        (index, curves.curve(run.curves, x, y, split))
        for index, run in enumerate(runs)
        if (run.curves.train if split == "train" else run.curves.validation)
    ]
    unit, unit_name = 1.0, ""
    if x == "time" and drawn:
        unit, unit_name = plotting.time_unit(max(max(curve.x) for _, curve in drawn))
    data, values = [], []
    for index, curve in drawn:
        finite = [(at / unit, value) for at, value in zip(curve.x, curve.y, strict=True) if math.isfinite(value)]
        points = thin(finite, _most_points(runs))
        more: Plot = {"hovertemplate": f"%{{y:.5g}} after %{{x:.5s}} {unit_name or 'tokens'}"}
        if split == "validation":
            more |= {"mode": "lines+markers", "marker": {"symbol": index % 8, "size": 7}}
        data.append(line(index, curve.label, [at for at, _ in points], [value for _, value in points], **more))
        values += [value for _, value in points]
    layout: Plot = {"yaxis": _log_axis(values)} if y == "perplexity" and values and max(values) > 2 * min(values) else {}
    if x == "tokens":
        layout["xaxis"] = {"rangemode": "tozero"}
    return plot(data, f"training time ({unit_name})" if x == "time" else "training tokens", title, **layout)


def _log_axis(values: Sequence[float]) -> Plot:
    ticks = plotting.perplexity_ticks(min(values) * 0.9, max(values) * 1.1)
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.4g}" for tick in ticks]}


def throughput(runs: Sequence[ReportedRun]) -> Figure:
    """Tokens a second of each log interval, and the limit of the schedule where the baseline is there."""
    figure = Figure(
        "throughput",
        "Throughput against its limit",
        "Tokens a second of each log interval. Intervals with a drain (evaluations, checkpoints) are slower, because the "
        "pipeline runs empty and fills again.",
        height=320,
    )
    data = []
    for index, run in enumerate(runs):
        points = [(float(i.end), i.tokens / i.seconds) for i in log_intervals(run.events) if i.seconds]
        if not points:
            figure.notes.append(f"{run.label}: no log line in its metrics file, so no throughput.")
            continue
        thinned = thin(points, _most_points(runs))
        template = "%{y:,.0f} tokens/s up to iteration %{x:,.0f}"
        data.append(line(index, run.label, [x for x, _ in thinned], [y for _, y in thinned], hovertemplate=template))
    for comparison in compare(runs):
        base = speed(comparison.baseline)
        if comparison.limit is None or base is None:
            continue
        n, a, at = comparison.run.num_stages, comparison.run.microbatches_per_update, runs.index(comparison.run)
        limit = base.tokens_per_s * comparison.limit
        name = f"limit of {comparison.run.label}: {comparison.limit:.3g} × {comparison.baseline.label}"
        template = f"{limit:,.0f} tokens/s: {plain(name)}"
        ends = [0, max(run.iterations for run in runs)]
        dashed = {"color": f"@run-{at}", "width": 1.5, "dash": "dash"}
        data.append(line(at, name, ends, [limit, limit], line=dashed, hovertemplate=template))
        said = (
            f" Dashed is what the end of the bubble is worth: {comparison.limit:.3g} times the speed of "
            f"{comparison.baseline.label}, (a+N-1)/a with N = {n} stages and a = {a} micro-batches per update. 1F1B-flush "
            "stands still for transfers too, so PACI may come out a little above."
        )
        if said not in figure.caption:
            figure.caption += said
    if data and not any("dash" in trace["line"] for trace in data):
        figure.notes.append(
            "No limit is drawn: it needs a run of 1F1B-flush with as many stages and micro-batches per update beside one "
            "of PACI."
        )
    figure.variants["Throughput"] = [plot(data, "iteration", "tokens/s", yaxis={"rangemode": "tozero"})]
    return figure


def clipping(runs: Sequence[ReportedRun]) -> Figure:
    """Gradient norms against the norm that they are clipped to."""
    figure = Figure(
        "clipping",
        "Gradient norms, and what they are clipped to",
        "The norm over all stages of the last update that a log line knows of, before clipping.",
        height=300,
    )
    data = []
    for index, run in enumerate(runs):
        known = [(float(at), norm) for at, norm in norms(run) if math.isfinite(norm) and norm > 0]
        points = thin(known, _most_points(runs))
        if not points:
            figure.notes.append(f"{run.label}: no gradient norm in its metrics file; Megatron computes it to clip by it.")
            continue
        template = "gradient norm %{y:.4g}, iteration %{x:,.0f}"
        data.append(line(index, run.label, [x for x, _ in points], [y for _, y in points], hovertemplate=template))
    limits = {run.header["clip_grad"] for run in runs if run.header.get("clip_grad")}
    for limit in sorted(limits) if data else ():
        ends, style = [0, max(run.iterations for run in runs)], {"color": "@muted", "width": 1.5, "dash": "dash"}
        name = f"--clip-grad {limit:g}"
        data.append(line(0, name, ends, [limit, limit], line=style, hovertemplate=name))
    values = [value for trace in data for value in trace["y"]]
    axis = _log_axis(values) if values and max(values) > 1.5 * min(values) else {"rangemode": "tozero"}
    figure.variants["Norms"] = [plot(data, "iteration", "gradient norm", yaxis=axis)]
    return figure
