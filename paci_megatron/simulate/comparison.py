"""Schedules side by side: which exist for a pipeline, and a table of what they give."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from paci_megatron.usage import require

from .advice import Outcome, Scenario
from .peers import Schedule, find_schedule

GIB = 2**30

DEFAULT_SCHEDULES = (
    "1f1b", "interleaved:2", "zb-h1", "zb-2p", "pipedream-2bw", "pipedream", "paci", "paci:1", "paci-v", "paci-v:1:2:1"
)  # fmt: skip


def choose_schedules(names: Sequence[str] | None, scenario: Scenario) -> list[Schedule]:
    """The schedules to compare. Of those not asked for by name, the ones that exist for this size."""
    n, a = scenario.num_stages, scenario.microbatches_per_update
    if names is None:
        slack = [f"paci:{n - 1}"] if n > 2 else []  # one more for each stage that follows
        return [s for s in map(find_schedule, [*DEFAULT_SCHEDULES, *slack]) if s.problem(n, a) is None]
    schedules = [find_schedule(name) for name in names]
    for schedule in schedules:
        problem = schedule.problem(n, a)
        require(problem is None, f"--schedules {problem}")
    return schedules


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *right]))
    return lines


def table(outcomes: Sequence[Outcome], activation_bytes: float | None = None) -> str:
    """The outcomes for people, a line each; activations are those of the stage that holds most."""
    columns = ("micro-batches/s", "vs flush", "bubble", "activations", "extra weights", "max drift", "mean drift")
    rows = [("", *columns)]
    for outcome in outcomes:
        activations = max(outcome.peak_activations)
        memory = "" if activation_bytes is None else f" ({activations * activation_bytes / GIB:.3g} GiB)"
        rows.append(
            (
                outcome.title,
                f"{outcome.microbatches_per_s:.4g}",
                f"{outcome.speedup_vs_flush:.3f}x",
                f"{fmean(outcome.bubble_fraction):.1%}",
                f"{activations:.3g}{memory}",
                f"{max(outcome.extra_weight_copies)}",
                f"{max(outcome.max_drift)}",
                f"{fmean(outcome.mean_drift):.3f}",
            )
        )
    lines = aligned(rows)
    late = [f"{o.title} {o.updates_late}" for o in outcomes if o.updates_late]
    if late:
        lines.append(f"Updates that gradients may be late, with older weights kept: {', '.join(late)}.")
    return "\n".join(lines)
