"""Timelines as files for other programs: CSV, Chrome trace, and an HTML page that needs nothing else."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Sequence

from paci_megatron.schedule.actions import COMPUTE_KINDS, TRANSFER_KINDS, Kind

from .render import Timelines

COLOURS = {
    Kind.FORWARD: "#56B4E9",
    Kind.BACKWARD: "#E69F00",
    Kind.INPUT_GRADIENT: "#E69F00",
    Kind.WEIGHT_GRADIENT: "#009E73",
    Kind.UPDATE: "#CC79A7",
    Kind.REPORT: "#882255",
} | dict.fromkeys(TRANSFER_KINDS, "#888888")
"""By what a stage does; told apart by the colour-blind too."""

WAITING_COLOUR = "#E4E4E4"
WAITING = "waiting for a neighbour"

LABELS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "input gradient",
    Kind.WEIGHT_GRADIENT: "weight gradient",
    Kind.UPDATE: "update",
    Kind.REPORT: "gradient sums",
} | dict.fromkeys(TRANSFER_KINDS, "transfer")


def to_csv(timelines: Timelines) -> str:
    """One line an action."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("schedule", "stage", "action", "kind", "index", "chunk", "start_ms", "end_ms", "waiting_ms"))
    for title, stages in timelines.items():
        for stage, spans in enumerate(stages):
            for span in spans:
                action = span.action
                times_ms = (f"{seconds * 1000:.6g}" for seconds in (span.start_s, span.end_s, span.waiting_s))
                writer.writerow((title, stage, action, LABELS[action.kind], action.index, action.chunk, *times_ms))
    return text.getvalue()


def to_chrome_trace(timelines: Timelines) -> str:
    """JSON for chrome://tracing and https://ui.perfetto.dev: a process for each schedule, a thread for each stage."""
    events: list[dict[str, object]] = []
    for process, (title, stages) in enumerate(timelines.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        for stage, spans in enumerate(stages):
            place = {"pid": process, "tid": stage}
            events.append({"ph": "M", "name": "thread_name", **place, "args": {"name": f"stage {stage}"}})
            for span in spans:
                if span.waiting_s:
                    waiting_us = {"ts": (span.start_s - span.waiting_s) * 1e6, "dur": span.waiting_s * 1e6}
                    events.append({"ph": "X", "name": f"wait {span.action}", "cat": WAITING, **place, **waiting_us})
                times_us = {"ts": span.start_s * 1e6, "dur": (span.end_s - span.start_s) * 1e6}
                events.append({"ph": "X", "name": str(span.action), "cat": LABELS[span.action.kind], **place, **times_us})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Pipeline schedules</title><style>
body {{ font: 14px sans-serif; margin: 1.5em; }}
div {{ overflow-x: auto; }}
text {{ font-size: 10px; pointer-events: none; }}
td, th {{ padding: 0.1em 0.8em; text-align: right; }}
{styles}
</style></head><body>
<p>{legend}. White is idle. Point at an action for its times; scroll to the right for more.</p>
{table}
{pictures}
</body></html>
"""
_ROW_PX, _LEFT_PX, _ACTION_PX = 20, 60, 26


def to_html(timelines: Timelines, table: Sequence[Sequence[str]] = ()) -> str:
    """A page with one picture a schedule, all to the same scale, below ``table``: its head and its rows."""
    spans = [span for stages in timelines.values() for row in stages for span in row if span.end_s > span.start_s]
    used = [kind for kind in COLOURS if any(span.action.kind is kind for span in spans)]
    computing_s = [span.end_s - span.start_s for span in spans if span.action.kind in COMPUTE_KINDS]
    px_per_s = _ACTION_PX * len(computing_s) / sum(computing_s) if computing_s else 1.0
    styles = [f".{kind} {{ fill: {COLOURS[kind]}; stroke: white; }}" for kind in used]
    kinds = {LABELS[kind]: [other for other in used if LABELS[other] == LABELS[kind]] for kind in used}
    legend = [f'<b style="color: {COLOURS[same[0]]}">{" ".join(same)}</b> {label}' for label, same in kinds.items()]
    if any(span.waiting_s for span in spans):
        styles.append(f".waiting {{ fill: {WAITING_COLOUR}; }}")
        legend.append(f'<b style="background: {WAITING_COLOUR}">grey</b> {WAITING}')
    return _PAGE.format(
        styles="\n".join(styles),
        legend=", ".join(legend),
        table=_table(table),
        pictures="\n".join(_picture(title, timelines, px_per_s) for title in timelines),
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    lines = "\n".join(f"<tr>{cells}</tr>" for cells in (head, *body))
    return f"<table>\n{lines}\n</table>"


def _picture(title: str, timelines: Timelines, px_per_s: float) -> str:
    stages = timelines[title]
    end_s = max((spans[-1].end_s for spans in stages if spans), default=0.0)
    shapes = []
    for stage, spans in enumerate(stages):
        top = stage * _ROW_PX
        shapes.append(f'<text x="0" y="{top + 14}">stage {stage}</text>')
        for span in spans:
            left, width = _LEFT_PX + span.start_s * px_per_s, (span.end_s - span.start_s) * px_per_s
            if span.waiting_s:
                waiting_px, tip = span.waiting_s * px_per_s, f"{span.waiting_s * 1000:.6g} ms of waiting for {span.action}"
                place = f'x="{left - waiting_px:.1f}" y="{top}" width="{waiting_px:.1f}" height="{_ROW_PX - 2}"'
                shapes.append(f'<rect class="waiting" {place}><title>{tip}</title></rect>')
            tip = f"{span.action} {span.start_s * 1000:.6g} to {span.end_s * 1000:.6g} ms"
            shapes.append(
                f'<rect class="{span.action.kind}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW_PX - 2}">'
                f"<title>{tip}</title></rect>"
            )
            if width >= 7 * len(str(span.action)):
                shapes.append(f'<text x="{left + 2:.1f}" y="{top + 13}">{span.action}</text>')
    size = f'width="{_LEFT_PX + end_s * px_per_s:.0f}" height="{len(stages) * _ROW_PX}"'
    body = "\n".join(shapes)
    return f'<h2>{html.escape(title)}</h2>\n<div><svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg></div>'
