"""A discrete-event simulation of plans: when each action would run, given what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .actions import Action, Kind


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward, a backward, an update, and of carrying one tensor to a neighbour (overlapping compute)."""

    forward: float
    backward: float
    update: float = 0.0
    transfer: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """An action with its start and end, in seconds since the start of the simulation."""

    action: Action
    start: float
    end: float


@dataclass
class Timeline:
    """What :func:`simulate` found: for each stage its spans in order."""

    spans: list[list[Span]] = field(default_factory=list)

    def duration(self) -> float:
        """Seconds from the first start to the last end over all stages."""
        return max((spans[-1].end for spans in self.spans if spans), default=0.0)

    def bubble_fraction(self, stage_index: int) -> float:
        """The share of :meth:`duration` that the stage idles, in [0, 1]."""
        busy = sum(span.end - span.start for span in self.spans[stage_index])
        return 1.0 - busy / self.duration() if self.duration() else 0.0


def simulate(plans: Sequence[Sequence[Action]], costs: Costs, allow_deadlock: bool = False) -> Timeline:
    """Run the compute actions of ``plans``, one list per stage; transfer actions in them are implied and ignored.

    A forward starts when the previous stage's forward of that micro-batch has ended and been carried over, a backward
    likewise from the next stage. ``ValueError`` if some stage waits for ever, unless ``allow_deadlock``.
    """
    seconds = {Kind.FORWARD: costs.forward, Kind.BACKWARD: costs.backward, Kind.UPDATE: costs.update}
    compute = [[action for action in plan if action.kind in seconds] for plan in plans]
    last = len(plans) - 1
    timeline = Timeline([[] for _ in plans])
    ended: dict[tuple[int, Action], float] = {}
    free_at = [0.0] * len(plans)

    def ready_at(stage: int, action: Action) -> float | None:
        """When the action's input is there: 0 if it needs none from a neighbour, None if not computed yet."""
        source = stage
        if action.kind is Kind.FORWARD:
            source = stage - 1
        elif action.kind is Kind.BACKWARD and stage < last:
            source = stage + 1
        if source < 0 or source == stage:
            return 0.0
        end = ended.get((source, action))
        return None if end is None else end + costs.transfer

    progress = True
    while progress:
        progress = False
        for stage, plan in enumerate(compute):
            spans = timeline.spans[stage]
            while len(spans) < len(plan):
                action = plan[len(spans)]
                ready = ready_at(stage, action)
                if ready is None:
                    break
                start = max(free_at[stage], ready)
                free_at[stage] = start + seconds[action.kind]
                ended[stage, action] = free_at[stage]
                spans.append(Span(action, start, free_at[stage]))
                progress = True
    stuck = [stage for stage, plan in enumerate(compute) if len(timeline.spans[stage]) < len(plan)]
    if stuck and not allow_deadlock:
        raise ValueError(f"stages {stuck} wait for ever: the plans do not match")
    return timeline
