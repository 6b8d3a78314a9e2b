"""Where a stage is in its plan and whom it waits for, for a pipeline that hangs. Callable from any thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from paci_megatron.schedule import Action, Kind

if TYPE_CHECKING:
    from .running_plan import RunningPlan

# Whose doing an action waits for, as an offset to the stage's own index.
_WAITS_FOR = {
    Kind.FORWARD: -1,
    Kind.TOTAL: -1,
    Kind.SEND_BACKWARD: -1,
    Kind.BACKWARD: 1,
    Kind.REPORT: 1,
    Kind.SEND_FORWARD: 1,
}


def waiting_s(running: RunningPlan) -> float:
    """For how long the action at hand has been going on; 0 between two calls of the executor."""
    executor = running.executor
    return time.monotonic() - executor.since_s if executor.current is not None else 0.0


def where(running: RunningPlan) -> str:
    """The stage's place in its plan in words: iteration, last action, the one at hand and which stage that needs."""
    executor, stage_index = running.executor, running.stage.stage_index
    iteration = running.begin + executor.updates + 1
    text = f"stage {stage_index}, update of iteration {iteration}, last finished {executor.finished}"
    action: Action | None = executor.current
    if action is None:
        return f"{text}, outside the plan"
    text += f", at {action} for {waiting_s(running):.0f} s"
    peer = stage_index + _WAITS_FOR.get(action.kind, 0)
    if peer == stage_index or not 0 <= peer < running.plan.num_stages:
        return text
    return f"{text}, which needs stage {peer} (rank {running.transport.rank_of(peer)})"


def plan_text(running: RunningPlan) -> str:
    """The plan of all stages, from the update before this stage's last to the one after its next."""
    around = range(max(running.executor.updates - 1, 1), running.executor.updates + 3)
    rows = []
    for stage in range(running.plan.num_stages):
        text, update = [], 1
        for action in running.plan.actions(stage):
            if update in around:
                text.append(str(action))
            update += action.kind is Kind.UPDATE
            if update not in around and update > around[0]:
                break
        rows.append(f"stage {stage}: {' '.join(text)}")
    return "\n".join(rows)
