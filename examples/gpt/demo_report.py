"""What the demo's two runs show: a summary from their metrics files, a table and the curves."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from paci_megatron.telemetry import plotting
from paci_megatron.telemetry.curves import Curve
from paci_megatron.telemetry.run_events import Event, named
from paci_megatron.telemetry.speed import steady_intervals, tokens_per_second

SCHEDULES = ("1f1b", "paci")
NAMES = {"1f1b": "1F1B-flush", "paci": "PACI"}


class Evaluation(NamedTuple):
    """Perplexity on the held-out documents after ``tokens`` tokens and ``train_s`` seconds of training."""

    iteration: int
    tokens: int
    train_s: float
    perplexity: float


def evaluations(events: list[Event]) -> list[Evaluation]:
    """The evaluations in order, one an iteration.

    Megatron evaluates twice after the last iteration, on different samples of the same size: their losses are averaged.
    """
    by_iteration: dict[int, list[Event]] = defaultdict(list)
    for event in named(events, "evaluation"):
        by_iteration[event["iteration"]].append(event)
    return [
        Evaluation(iteration, same[0]["tokens"], same[0]["train_s"], math.exp(fmean(event["loss"] for event in same)))
        for iteration, same in by_iteration.items()
    ]


def summarize_run(events: list[Event]) -> dict[str, Any]:
    """One schedule's figures. ``train_seconds`` is all of training without evaluations, ``tokens_per_second`` the speed
    in steady state, ``bubble_fraction`` the mean over time and stages, fills and drains included.
    """
    train, drains = named(events, "train"), named(events, "drain")
    if not (train and drains and train[0]["iteration"] == 1 and named(events, "evaluation")):
        raise ValueError("incomplete metrics: expected the first iteration, an evaluation and a drain")
    stages = [stage for drain in drains for stage in drain["stages"]]
    wall_s = sum(stage["wall_s"] for stage in stages)
    return {
        "validation_ppl": evaluations(events)[-1].perplexity,
        "initial_ppl": math.exp(train[0]["loss"]),  # the loss of the first iteration precedes the first update
        "tokens": train[-1]["tokens"],
        "train_seconds": train[-1]["train_s"],
        "tokens_per_second": tokens_per_second(events),
        "iterations": train[-1]["iteration"],
        "max_drift": max(stage["max_drift"] for stage in stages),
        "bubble_fraction": sum(stage["bubble_fraction"] * stage["wall_s"] for stage in stages) / wall_s,
    }


def summarize(runs: dict[str, list[Event]], num_stages: int, microbatches_per_update: int) -> dict[str, Any]:
    """The content of ``summary.json`` from each schedule's events.

    ``ValueError`` if the two speeds were not measured over the same iterations.
    """
    flush, paci = ([(i.start, i.end) for i in steady_intervals(runs[schedule])] for schedule in SCHEDULES)
    if flush != paci:
        raise ValueError(f"the runs' steady log intervals differ: {flush} and {paci}")
    schedules = {schedule: summarize_run(runs[schedule]) for schedule in SCHEDULES}
    return {
        "num_stages": num_stages,
        "microbatches_per_update": microbatches_per_update,
        "speedup_limit": (microbatches_per_update + num_stages - 1) / microbatches_per_update,
        "speedup": schedules["paci"]["tokens_per_second"] / schedules["1f1b"]["tokens_per_second"],
        "schedules": schedules,
    }


_ROWS = (
    ("validation perplexity", "validation_ppl", "{:.2f}"),
    ("  at initialisation", "initial_ppl", "{:,.0f}"),
    ("tokens trained on", "tokens", "{:,}"),
    ("training time (s)", "train_seconds", "{:.1f}"),
    ("tokens/s in steady state", "tokens_per_second", "{:,.0f}"),
    ("max drift (updates)", "max_drift", "{}"),
    ("bubble, measured", "bubble_fraction", "{:.1%}"),
)


def table(summary: dict[str, Any]) -> str:
    """The summary for people: both schedules side by side, then the speed-up beside its limit."""
    lines = [f"{'':26}" + "".join(f"{NAMES[schedule]:>14}" for schedule in SCHEDULES)]
    for label, key, form in _ROWS:
        values = (form.format(summary["schedules"][schedule][key]) for schedule in SCHEDULES)
        lines.append(f"{label:26}" + "".join(f"{value:>14}" for value in values))
    num_stages, a = summary["num_stages"], summary["microbatches_per_update"]
    lines.append("")
    lines.append(
        f"speed-up {summary['speedup']:.2f}x; the bubble alone accounts for at most (a+N-1)/a = "
        f"{summary['speedup_limit']:.2f}x with N={num_stages} stages and a={a} micro-batches per update"
    )
    return "\n".join(lines)


def plot_curves(runs: dict[str, list[Event]], summary: dict[str, Any], path: Path) -> None:
    """Write the picture: validation perplexity against training time and against tokens, both schedules."""
    figure, (by_time, by_tokens) = plotting.new_figure(2, size=(10, 4.4))
    points = {schedule: evaluations(runs[schedule]) for schedule in SCHEDULES}

    def curves(attribute: str) -> list[Curve]:
        return [
            Curve(NAMES[s], [getattr(point, attribute) for point in points[s]], [point.perplexity for point in points[s]])
            for s in SCHEDULES
        ]

    plotting.draw(by_time, curves("train_s"))
    plotting.draw(by_tokens, curves("tokens"))
    by_time.set(xlabel="training time without evaluations (s)", ylabel="validation perplexity")
    by_tokens.set(xlabel="tokens trained on")
    plotting.use_short_counts(by_tokens)
    plotting.use_log_ticks(by_time)
    for axes in (by_time, by_tokens):
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
        plotting.finish(axes)
    num_stages, a = summary["num_stages"], summary["microbatches_per_update"]
    figure.suptitle(f"{num_stages} stages, {a} micro-batches per update: speed-up {summary['speedup']:.2f}x")
    plotting.save(figure, path)
