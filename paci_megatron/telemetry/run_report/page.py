"""Writes the page: what the figures say in numbers, the figures, and how the runs were made."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from . import figures, stage_figures
from .figures import Figure
from .headline import headline, runs_table
from .measures import norms, sums_by_stage
from .runs import ReportedRun, read_runs
from .timeline import timeline

# Okabe and Ito's, as in the other pictures: blue for 1F1B-flush, vermilion for PACI, then the rest. Lighter on dark.
_FLUSH, _PACI = ("#0072B2", "#4FB3F0"), ("#D55E00", "#FF8A4C")
_OTHERS = (
    ("#009E73", "#2FD3A0"),
    ("#B0568F", "#E79AC8"),
    ("#B07A00", "#F5B942"),
    ("#5A6ACF", "#9DA9FF"),
    ("#555555", "#BBBBBB"),
)

SECTIONS: tuple[Callable[[Sequence[ReportedRun]], Figure], ...] = (
    timeline,
    figures.losses,
    figures.throughput,
    stage_figures.bubble,
    stage_figures.time_by_stage,
    stage_figures.drift,
    figures.clipping,
    stage_figures.memory,
)


def write_report(named_paths: Sequence[tuple[str | None, Path]], output: Path) -> None:
    """Write the page about the runs in these metrics files and folders; see :func:`~.runs.read_runs` for the labels.

    ``ValueError`` or ``OSError`` if a run cannot be read; nothing is written then. ``ModuleNotFoundError`` without plotly.
    """
    page = render(read_runs(named_paths))
    output.write_text(page, encoding="utf-8")


def render(runs: Sequence[ReportedRun]) -> str:
    """The page, with everything in it that it needs."""
    from plotly.offline import get_plotlyjs

    shown = [section(runs) for section in SECTIONS]
    data = {figure.name: figure.variants for figure in shown if not figure.is_empty}
    own = files(__package__)
    title = " and ".join([", ".join(run.label for run in runs[:-1]), runs[-1].label] if runs[1:] else [runs[0].label])
    body = [
        _head(runs, title, shown),
        headline(runs),
        runs_table(runs),
        *(_section(figure, _after(figure, runs)) for figure in shown),
        _set_up(runs),
        _commands(runs),
    ]
    template = Template(own.joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"{title}: run report"),
        colours=_colours(runs),
        style=own.joinpath("page.css").read_text(encoding="utf-8"),
        body="\n".join(body),
        data=_json(data),
        plotly=get_plotlyjs(),
        script=own.joinpath("page.js").read_text(encoding="utf-8"),
    )


def _json(data: Any) -> str:
    """For a script element: plotly.js wants null for what is no number, and no text may end the element."""
    return json.dumps(_finite(data), separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _colours(runs: Sequence[ReportedRun]) -> str:
    """The runs' colours as properties of the page: the first run of a schedule has that of the schedule."""
    others, fixed = iter(_OTHERS * len(runs)), {"1f1b": _FLUSH, "paci": _PACI}
    pairs = [fixed.pop(run.schedule) if run.schedule in fixed else next(others) for run in runs]
    light, dark = ("".join(f"--run-{i}:{pair[theme]};" for i, pair in enumerate(pairs)) for theme in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root:not(.paper){{{dark}}}}}"


def _head(runs: Sequence[ReportedRun], title: str, shown: Sequence[Figure]) -> str:
    links = "".join(f'<a href="#{figure.name}">{html.escape(figure.name.capitalize())}</a>' for figure in shown)
    links += '<a href="#set-up">Set-up</a><a href="#commands">Commands</a>'
    sizes = [_size(run) for run in runs]
    same = len(set(sizes)) == 1
    about = sizes[0] if same else "; ".join(f"{run.label}: {size}" for run, size in zip(runs, sizes, strict=True))
    return (
        f'<header><p class="eyebrow">Run report</p><h1>{html.escape(title)}</h1><p class="about">{html.escape(about)}</p>'
        f'<nav aria-label="Sections">{links}</nav></header><main id="main">'
    )


def _size(run: ReportedRun) -> str:
    n, a, header = run.num_stages, run.microbatches_per_update, run.header
    parts = [f"{n} stages" if n else "", f"{a} micro-batches per update" if a else "", f"{run.iterations:,} iterations"]
    if header:
        parts.append(f"{header['micro_batch_size']} × {header['seq_length']:,} tokens a micro-batch")
        parts.append("emulated in one process" if header["emulated"] else "")
        parts.append(f"{header['data_parallel_size']} pipelines" if header["data_parallel_size"] > 1 else "")
        parts.append(str(header["device"]))
    return ", ".join(part for part in parts if part)


def _section(figure: Figure, after: str) -> str:
    name, title = figure.name, html.escape(figure.title)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in figure.notes)
    inside = ""
    if not figure.is_empty:
        choices = [choice for choice, plots in figure.variants.items() if any(plot["data"] for plot in plots)]
        radios = "".join(
            f'<label><input type="radio" name="{name}" value="{html.escape(choice)}"{" checked" * (number == 0)}>'
            f"<span>{html.escape(choice)}</span></label>"
            for number, choice in enumerate(choices)
        )
        choose = f'<fieldset class="choice"><legend>Show</legend>{radios}</fieldset>' if len(choices) > 1 else ""
        count = max(len(plots) for plots in figure.variants.values())
        plots = "".join(
            f'<div class="plot" id="{name}-{number}" style="height:{figure.height}px" role="img" aria-label="{title}"></div>'
            for number in range(count)
        )
        inside = f'{choose}{_legend(figure)}<div class="plots" data-figure="{name}">{plots}</div>'
    caption = f'<p class="caption">{html.escape(figure.caption)}</p>' if inside else ""
    return f'<section id="{name}"><h2>{title}</h2>{inside}{caption}{after}{notes}</section>'


def _legend(figure: Figure) -> str:
    """What the colours and strokes are, once for all plots of the figure."""
    items: dict[str, str] = {}
    traces = [trace for plots in figure.variants.values() for plot in plots for trace in plot["data"]]
    for trace in sorted(traces, key=lambda trace: trace.get("mode") == "markers"):
        if trace["type"] == "bar":
            style = f"background:{_css(trace['marker']['color'])}"
        elif trace["mode"] == "markers":
            style = "height:3px;background:var(--text)"
        else:
            kind = "dashed" if "dash" in trace["line"] else "solid"
            style = f"height:0;border-radius:0;border-top:3px {kind} {_css(trace['line']['color'])};width:1.5em"
        items.setdefault(trace["name"], style)
    # A name is escaped already.
    shown = "".join(f'<li><i class="swatch" style="{style}"></i>{name}</li>' for name, style in items.items())
    return f'<ul class="legend">{shown}</ul>'


def _css(token: str) -> str:
    return f"var(--{token.removeprefix('@')})"


def _after(figure: Figure, runs: Sequence[ReportedRun]) -> str:
    return _gradients(runs) if figure.name == "clipping" else ""


def _gradients(runs: Sequence[ReportedRun]) -> str:
    """What was clipped, skipped and fallen back from."""
    rows = []
    for run in runs:
        clip, logged = run.header.get("clip_grad"), norms(run)
        above = sum(norm > clip for _, norm in logged) if clip else 0
        how = f", {run.header['clip_mode']}" if run.schedule != "1f1b" and clip else ""
        clipping = {None: "not said in its metrics file", 0: "none"}.get(clip, f"--clip-grad {clip}{how}")
        counts = sums_by_stage(run, "skipped_updates")
        skipped = ", ".join(f"{count} on stage {stage}" for stage, count in enumerate(counts) if count) or "none"
        skipped = skipped if run.drains else "not known before a drain"
        falls = [event for event in run.events if event["event"] == "fallback"]
        said = "<br>".join(html.escape(event["reason"]) for event in falls) or "none"
        seen = f"{above:,} of {len(logged):,}" if logged and clip else "no norms" if clip else "0"
        cells = (html.escape(run.label), html.escape(clipping), seen, skipped, said)
        rows.append("<tr><th scope='row'>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>".format(*cells))
    heads = ("run", "clipping", "logged norms above it", "skipped updates", "fallbacks to 1F1B-flush")
    return _table("Clipping in numbers", heads, rows)


def _table(name: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def _set_up(runs: Sequence[ReportedRun]) -> str:
    parts = []
    for run in runs:
        lines = run.header.get("set_up")
        said = "".join(f"<li>{html.escape(line)}</li>" for line in lines or ())
        missing = "not said in its metrics file" if lines is None else "nothing"
        parts.append(
            f"<h3>{html.escape(run.label)}</h3>" + (f"<ul>{said}</ul>" if said else f'<p class="note">{missing}</p>')
        )
    return f'<section id="set-up"><h2>What was switched off, replaced or chosen</h2>{"".join(parts)}</section>'


def _commands(runs: Sequence[ReportedRun]) -> str:
    parts = []
    for run in runs:
        parts.append(f"<h3>{html.escape(run.label)}</h3>")
        commands = list(dict.fromkeys(header["command"] for header in run.headers))
        for command in commands:
            parts.append(f'<pre tabindex="0"><code>{html.escape(command)}</code></pre>')
        if not commands:
            parts.append('<p class="note">not said in its metrics file, which an earlier version has written</p>')
            continue
        known = ", ".join(f"{name} {number}" for name, number in run.header["versions"].items())
        resumed = [str(header["iteration"]) for header in run.headers[1:]]
        more = f"; resumed after iteration {', '.join(resumed)}" if resumed else ""
        parts.append(f"<p>In {html.escape(run.header['folder'])}, with {html.escape(known)}{more}.</p>")
        parts.append(f'<p class="note">Metrics: {html.escape(str(run.path))}</p>')
    return f'<section id="commands"><h2>Commands and versions</h2>{"".join(parts)}</section>'
