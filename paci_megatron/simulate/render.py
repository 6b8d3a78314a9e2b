"""Plans and timelines as text grids, for people."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from paci_megatron.schedule.actions import COMPUTE_KINDS, Action

from .costs import Costs, StageCosts
from .engine import Span, simulate

Timelines = Mapping[str, Sequence[Sequence[Span]]]
"""For each schedule, by its title, the spans of each stage in order."""


def render_plans(plans: Sequence[Sequence[Action]], max_columns: int = 40) -> str:
    """The compute actions of each stage, one row a stage, one column a slot of equal time, ``.`` for idle.

    A plan that cannot run to its end is shown as far as it can; the rest of each row follows after ``|`` in plan order.
    """
    chunks = 1 + max((action.chunk for plan in plans for action in plan), default=0)
    unit = Costs((StageCosts(chunks, chunks),) * len(plans))
    runs = simulate(plans, unit, chunks=chunks, record=True, allow_deadlock=True).stages
    rows = _rows([run.spans for run in runs], 1, max_columns)
    for stage, plan in enumerate(plans):
        stuck = [str(action) for action in plan if action.kind in COMPUTE_KINDS][len(runs[stage].spans) :]
        if stuck:
            rows[stage] += f" | {' '.join(stuck[:max_columns])}"
    return "\n".join(rows)


def render_timelines(timelines: Timelines, max_columns: int = 100, slot_s: float | None = None) -> str:
    """Each schedule's grid under its title; ``=`` continues an action, ``-`` is waiting for a neighbour, ``.`` idle.

    A column is ``slot_s``, or as long as the shortest action.
    """
    if slot_s is None:
        durations_s = [s.end_s - s.start_s for stages in timelines.values() for spans in stages for s in spans]
        slot_s = min((duration_s for duration_s in durations_s if duration_s > 0), default=1)
    parts = []
    for title, stages in timelines.items():
        parts.append(f"{title}, {slot_s * 1000:.6g} ms a column")
        parts += _rows(stages, slot_s, max_columns)
    return "\n".join(parts)


def _rows(stages: Sequence[Sequence[Span]], slot_s: float, max_columns: int) -> list[str]:
    """A row a stage: in each slot the action at its middle."""
    width = max((len(str(span.action)) for spans in stages for span in spans), default=1)
    rows = []
    for stage, all_spans in enumerate(stages):
        spans = [span for span in all_spans if span.end_s > span.start_s]
        starts_s = [span.start_s for span in spans]
        slots = round(spans[-1].end_s / slot_s) if spans else 0
        cells, previous = [], -1
        for slot in range(min(slots, max_columns)):
            at_s = (slot + 0.5) * slot_s
            i = bisect_right(starts_s, at_s) - 1
            if i < 0 or spans[i].end_s <= at_s:
                waits = i + 1 < len(spans) and at_s >= spans[i + 1].start_s - spans[i + 1].waiting_s
                cells.append("-" if waits else ".")
            else:
                cells.append("=" if i == previous else str(spans[i].action))
            previous = i
        rows.append(f"stage {stage:>2}: {' '.join(cell.ljust(width) for cell in cells)}".rstrip())
    return rows
