"""The schedule as it was performed, above how it would run by the simulation, of all traced runs to one scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from paci_megatron.schedule import Kind
from paci_megatron.simulate.costs import Costs
from paci_megatron.simulate.engine import Span
from paci_megatron.simulate.export import LABELS
from paci_megatron.telemetry.trace_file import StageStretch
from paci_megatron.telemetry.trace_report import TraceReport

from .figures import Figure, Plot, plain
from .runs import ReportedRun

MOST_ITERATIONS = 4
MOST_SPANS = 10_000
"""Of all panels: what a browser still draws at once, and a page has room for. A longer window is cut, which it says."""

_BELOW_PX = 56
_TOKENS = {
    **{"forward": "@forward", "backward": "@backward", "update": "@update", "gradient sums": "@report"},
    **{"transfer": "@transfers"},
}


_TRANSFERS = {
    **{Kind.RECV_FORWARD: "receives the activation", Kind.SEND_FORWARD: "sends the activation"},
    **{Kind.RECV_BACKWARD: "receives the gradient", Kind.SEND_BACKWARD: "sends the gradient"},
}


class Panel(NamedTuple):
    """A run's stages, measured or simulated, in iterations ``first`` and on. ``versions[stage]`` has the weight version of
    each micro-batch's forward. Without ``knows_waits`` what is before an action is a gap, of which nothing is known.
    """

    title: str
    stages: list[list[Span]]
    versions: list[dict[int, int]]
    first: int
    microbatches_per_update: int
    knows_waits: bool


def timeline(runs: Sequence[ReportedRun]) -> Figure:
    """The figure of the schedules."""
    figure = Figure(
        "timeline",
        "The schedule, as measured and as simulated",
        "Each row is a stage, each bar an action with the number of its micro-batch since the last drain. Simulated is the "
        "same order with the median times that were measured of forwards, backwards and updates, and no time for transfers. "
        "Gaps are what no action accounts for: under 1F1B-flush, which is Megatron's own, all waiting.",
    )
    traced = [(run, run.trace) for run in runs if run.trace is not None]
    figure.notes += [f"{run.label}: {run.no_trace}." for run in runs if run.trace is None]
    if not traced:
        return figure
    most = MOST_SPANS // (2 * len(traced))  # of a panel
    shown = min(_iterations(trace, most) for _, trace in traced)
    panels = [panel for run, trace in traced for panel in _panels(run, trace, shown)]
    figure.caption += " Shown: " + "; ".join(
        f"{run.label}, iterations {first} to {last} of {run.iterations}"
        for run, (first, last) in ((run, trace.middle(shown)) for run, trace in traced)
    )
    cut = [_cut(panel, most) for panel in panels]
    if any(len(_spans(panel)) < len(_spans(whole)) for panel, whole in zip(cut, panels, strict=True)):
        figure.caption += f", as far as the first {most:,} actions"
    figure.caption += "."
    rows = [len(panel.stages) for panel in panels]
    row_px = 30 if sum(rows) <= 40 else 16
    figure.height = _BELOW_PX + sum(30 + row_px * count for count in rows)
    figure.variants["Timeline"] = [_plot(cut, figure.height)]
    return figure


def _iterations(trace: TraceReport, most: int) -> int:
    """How many iterations of the trace a panel has room for."""
    performed = sum(len(stage.between(trace.first, trace.first)) for stage in trace.stretch.stages)
    return max(1, min(MOST_ITERATIONS, trace.last - trace.first + 1, most // max(performed, 1)))


def _panels(run: ReportedRun, trace: TraceReport, iterations: int) -> list[Panel]:
    first, last = trace.middle(iterations)
    measured, knows_waits = trace.stretch.spans(first, last), trace.stretch.schedule != "1f1b"
    if not knows_waits:
        measured = [_with_waits(stage) for stage in measured]
    simulated = [_with_waits(stage) for stage in trace.simulated_spans(Costs(trace.costs), first, last)]
    versions = [_forward_versions(stage) for stage in trace.stretch.stages]
    a = trace.stretch.microbatches_per_update
    return [
        Panel(f"{run.label}, {how}", stages, versions, first, a, known)
        for how, stages, known in (("measured", measured, knows_waits), ("simulated", simulated, True))
    ]


def _forward_versions(stage: StageStretch) -> dict[int, int]:
    versions, version = {}, stage.begin
    for traced in stage.actions:
        if traced.action.kind is Kind.FORWARD:
            versions[traced.action.index] = version
        version += traced.action.kind is Kind.UPDATE
    return versions


def _with_waits(spans: Sequence[Span]) -> list[Span]:
    """With the time in which the stage did nothing before each action."""
    return [*spans[:1], *(replace(now, waiting_s=now.start_s - before.end_s) for before, now in pairwise(spans))]


def _spans(panel: Panel) -> list[Span]:
    return [span for stage in panel.stages for span in stage]


def _cut(panel: Panel, most: int) -> Panel:
    """The panel up to where ``most`` actions have begun."""
    spans = sorted(_spans(panel), key=lambda span: span.start_s)
    if len(spans) <= most:
        return panel
    end_s = spans[most].start_s
    return panel._replace(stages=[[span for span in stage if span.start_s < end_s] for stage in panel.stages])


def _plot(panels: Sequence[Panel], height: int) -> Plot:
    """All panels below each other over one axis of time."""
    end_s = max(span.end_s for panel in panels for span in _spans(panel))
    unit, name = (1000.0, "ms") if end_s < 10 else (1.0, "s")
    data: list[Plot] = []
    layout: Plot = {"barmode": "overlay", "bargap": 0, "annotations": [], "hovermode": "closest", "dragmode": "zoom"}
    layout["uniformtext"] = {"minsize": 9, "mode": "hide"}
    title_px, below_px = 30, _BELOW_PX
    room = height - below_px
    rows = sum(len(panel.stages) for panel in panels)
    row_px = (room - title_px * len(panels)) / rows
    top = 1.0
    for number, panel in enumerate(panels):
        axis = f"y{number + 1 if number else ''}"
        count, begin = len(panel.stages), top - title_px / room
        top = max(begin - row_px * count / room, 0.0)
        layout[f"yaxis{number + 1 if number else ''}"] = {
            **{"domain": [top, begin], "range": [count - 0.5, -0.5], "fixedrange": True, "zeroline": False},
            **{"tickvals": list(range(count)), "ticktext": [f"stage {stage}" for stage in range(count)], "showgrid": False},
        }
        title = {"text": f"<b>{plain(panel.title)}</b>", "xref": "paper", "yref": "paper", "x": 0, "y": begin}
        layout["annotations"].append({**title, "xanchor": "left", "yanchor": "bottom", "showarrow": False})
        data += _traces(panel, axis, unit, name)
    layout["xaxis"] = {"title": {"text": f"time ({name})"}, "range": [0, end_s * unit], "anchor": axis, "zeroline": False}
    return {"data": data, "layout": layout}


def _traces(panel: Panel, axis: str, unit: float, unit_name: str) -> Iterator[Plot]:
    """The panel's bars, a trace for each kind of action."""
    drawn: dict[str, list[tuple[int, Span, str]]] = {}
    for stage, spans in enumerate(panel.stages):
        version = panel.first - 1
        for span in spans:
            drawn.setdefault(LABELS[span.action.kind], []).append((stage, span, _about(panel, stage, span, version)))
            version += span.action.kind is Kind.UPDATE
    for label, token in _TOKENS.items():
        if label in drawn:
            bars = [(stage, span.start_s, span.end_s - span.start_s) for stage, span, _ in drawn[label]]
            texts = [f"{about}<br>{_times(span, unit, unit_name, panel.knows_waits)}" for _, span, about in drawn[label]]
            trace = _bars(label, token, axis, unit, bars, texts)
            if label in ("forward", "backward"):
                trace |= {"text": [str(span.action.index) for _, span, _ in drawn[label]], "textposition": "inside"}
                trace |= {"insidetextanchor": "middle", "textangle": 0, "textfont": {"color": "@on-bar", "size": 11}}
                odd = [(span.action.index // panel.microbatches_per_update) % 2 for _, span, _ in drawn[label]]
                trace["marker"]["opacity"] = [0.72 if is_odd else 1.0 for is_odd in odd]
            yield trace
    waits = [(stage, s) for stage, spans in enumerate(panel.stages) for s in spans if s.waiting_s * unit > 1e-3]
    if waits and panel.knows_waits:
        bars = [(stage, span.start_s - span.waiting_s, span.waiting_s) for stage, span in waits]
        texts = [f"stage {s}: waits {x.waiting_s * unit:.4g} {unit_name} for {_input(x)}" for s, x in waits]
        yield _bars("waiting", "@waiting", axis, unit, bars, texts)


def _bars(
    label: str, token: str, axis: str, unit: float, bars: Sequence[tuple[int, float, float]], texts: list[str]
) -> Plot:
    """Of (stage, begin, length in seconds) each."""
    return {
        **{"type": "bar", "orientation": "h", "name": label},
        **{"y": [stage for stage, _, _ in bars], "base": [round(begin * unit, 5) for _, begin, _ in bars]},
        **{"x": [round(length * unit, 5) for _, _, length in bars], "yaxis": axis, "width": 0.84},
        **{"customdata": texts, "hovertemplate": "%{customdata}<extra></extra>"},
        **{"marker": {"color": token, "line": {"width": 0.5, "color": "@card"}}},
    }


def _times(span: Span, unit: float, name: str, knows_waits: bool) -> str:
    begin, end, waited = span.start_s * unit, span.end_s * unit, span.waiting_s * unit
    before = f"waited {waited:.4g} {name}" if knows_waits else f"a gap of {waited:.4g} {name}"
    return f"{begin:.5g} to {end:.5g} {name}, so {end - begin:.4g} {name}; {before} before"


def _input(span: Span) -> str:
    """What an action waits for."""
    match span.action.kind:
        case Kind.FORWARD:
            return f"the activation of micro-batch {span.action.index}"
        case Kind.BACKWARD:
            return f"the gradient of micro-batch {span.action.index}"
        case _:
            return str(span.action)


def _about(panel: Panel, stage: int, span: Span, version: int) -> str:
    """What an action is, in words: the first lines of what is shown about it."""
    action = span.action
    name = f"<b>{action}</b> on stage {stage}: {_TRANSFERS.get(action.kind, LABELS[action.kind])}"
    a = panel.microbatches_per_update
    if action.kind in (Kind.UPDATE, Kind.REPORT, Kind.TOTAL):
        more = f"<br>weight version {version} becomes {version + 1}" if action.kind is Kind.UPDATE else ""
        return f"{name} of update {action.index}{more}"
    where = f"{name} of micro-batch {action.index}, number {action.index % a + 1} of {a} of its update"
    if action.kind is Kind.FORWARD:
        return f"{where}<br>weight version {version}"
    if action.kind is Kind.BACKWARD and (before := panel.versions[stage].get(action.index)) is not None:
        return f"{where}<br>weight version {version}, its forward had {before}: drift {version - before}"
    return where
