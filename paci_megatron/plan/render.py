"""Plans as text grids, for people."""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Action, Kind
from .simulate import Costs, simulate

_COMPUTE = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)


def render_plans(plans: Sequence[Sequence[Action]], max_columns: int = 40) -> str:
    """The compute actions of each stage, one row a stage, one column a slot of equal time, ``.`` for idle.

    A plan that cannot run to its end is shown as far as it can; the rest of each row follows after ``|`` in plan order.
    """
    compute = [[action for action in plan if action.kind in _COMPUTE] for plan in plans]
    timeline = simulate(compute, Costs(forward=1.0, backward=1.0), allow_deadlock=True)
    width = max((len(str(action)) for plan in compute for action in plan), default=1)
    rows = []
    for stage, plan in enumerate(compute):
        slots: dict[int, str] = {}
        for span in timeline.spans[stage]:
            if span.action.kind is not Kind.UPDATE:
                slots[round(span.start)] = str(span.action)
        cells = [slots.get(i, ".") for i in range(min(max(slots, default=-1) + 1, max_columns))]
        stuck = [str(action) for action in plan[len(timeline.spans[stage]) :]][:max_columns]
        row = " ".join(cell.ljust(width) for cell in cells).rstrip()
        rows.append(f"stage {stage:>2}: {row}" + (f" | {' '.join(stuck)}" if stuck else ""))
    return "\n".join(rows)
