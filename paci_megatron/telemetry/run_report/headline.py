"""The page's first rows: the few numbers that a run is judged by, and a table of them for all runs."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .measures import by_stage, compare, final_perplexity, measured_bubble, promised_bubble, speed
from .runs import ReportedRun

_NONE = "-"


def headline(runs: Sequence[ReportedRun]) -> str:
    """A row of tiles."""
    tiles = [_speedup(runs), _bubble(runs), _drift(runs), _perplexity(runs)]
    return f'<section class="tiles" aria-label="In short">{"".join(tiles)}</section>'


def _tile(title: str, values: Sequence[tuple[str, str]], more: str) -> str:
    """``values`` are numbers, each with what it is of."""
    shown = "".join(
        f'<p class="value">{html.escape(value)}' + (f" <small>{html.escape(of)}</small>" if of else "") + "</p>"
        for value, of in values
    )
    return f'<div class="tile"><h2>{html.escape(title)}</h2>{shown}<p class="more">{html.escape(more)}</p></div>'


def _speedup(runs: Sequence[ReportedRun]) -> str:
    compared = compare(runs)
    if not compared:
        known = speed(runs[0])
        values = [(f"{known.tokens_per_s:,.0f}" if known else _NONE, "tokens/s")]
        return _tile("Throughput", values, "One run: give a second one, such as 1F1B-flush, to see the speed-up.")
    values = [(f"{each.speedup:.2f}×", each.run.label if compared[1:] else "") for each in compared]
    limits = [f"the bubble alone is worth {each.limit:.2f}×" for each in compared if each.limit is not None]
    baseline = compared[0].baseline.label
    return _tile("Speed-up", values, f"over {baseline}" + (f"; {' or '.join(dict.fromkeys(limits))}" if limits else ""))


def _bubble(runs: Sequence[ReportedRun]) -> str:
    values, promised = [], []
    for run in runs:
        measured, by_order = measured_bubble(run), promised_bubble(run)
        if measured is not None:
            values.append((f"{measured:.1%}", run.label))
        if by_order is not None:
            promised.append(f"{by_order:.1%} {run.label}")
    more = f"promised by the order alone: {', '.join(promised)}" if promised else "What is promised needs N and a."
    return _tile("Bubble, measured", values or [(_NONE, "")], more)


def _drift(runs: Sequence[ReportedRun]) -> str:
    drifting = [run for run in runs if run.schedule != "1f1b" and run.drains]
    values = [_updates(max(by_stage(run, "max_drift")), run.label) for run in drifting]
    bounds = [bounds for run in drifting if (bounds := run.drift_bounds()) is not None]
    if not drifting:
        more = "1F1B-flush has none" if all(run.schedule == "1f1b" for run in runs) else "not known before a drain"
        return _tile("Largest drift", [(_NONE, "")], more)
    more = f"bound: {' or '.join(dict.fromkeys(str(max(each)) for each in bounds))}" if bounds else "The bound needs a."
    return _tile("Largest drift", values, more)


def _updates(drift: float, label: str) -> tuple[str, str]:
    return f"{drift:g}", f"{'update' if drift == 1 else 'updates'}, {label}"


def _perplexity(runs: Sequence[ReportedRun]) -> str:
    found = [(run, last) for run in runs if (last := final_perplexity(run)) is not None]
    values = [(_number(perplexity), run.label) for run, (_, perplexity) in found]
    after = dict.fromkeys(f"{iteration:,}" for _, (iteration, _) in found)
    more = f"on validation data, after {' and '.join(after)} iterations" if found else "no evaluation in the metrics files"
    return _tile("Final perplexity", values or [(_NONE, "")], more)


def _number(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def runs_table(runs: Sequence[ReportedRun]) -> str:
    """A column a run; exact figures are in the page's data."""
    columns = [_column(run) for run in runs]
    head = "".join(
        f'<th scope="col"><i class="swatch" style="background:var(--run-{index})"></i>{html.escape(run.label)}</th>'
        for index, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{html.escape(column[name])}</td>" for column in columns)}</tr>'
        for name in columns[0]
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    inside = f'<div class="scroll" tabindex="0" role="region" aria-label="In numbers">{table}</div>'
    return f'<section id="runs" aria-label="The runs">{inside}</section>'


def _column(run: ReportedRun) -> dict[str, str]:
    last, fast = run.curves.train[-1] if run.curves.train else None, speed(run)
    perplexity, measured, promised = final_perplexity(run), measured_bubble(run), promised_bubble(run)
    bounds = run.drift_bounds()
    drift = f"{max(by_stage(run, 'max_drift')):g}" if run.drains else _NONE
    if bounds:
        drift = "none" if run.schedule == "1f1b" else f"{drift} (at most {max(bounds)})"
    return {
        "validation perplexity": _number(perplexity[1]) if perplexity else _NONE,
        "tokens trained on": f"{last.tokens:,}" if last else _NONE,
        "training time": f"{last.seconds:,.1f} s" if last else _NONE,
        "tokens/s, pipeline full": f"{fast.tokens_per_s:,.0f}{'' if fast.is_steady else ' (in all)'}" if fast else _NONE,
        "bubble, measured": f"{measured:.1%}" if measured is not None else _NONE,
        "bubble, promised": f"{promised:.1%}" if promised is not None else _NONE,
        "largest drift, in updates": drift,
        "resumed": f"{len(run.headers) - 1} times" if len(run.headers) > 1 else "never" if run.headers else _NONE,
    }
