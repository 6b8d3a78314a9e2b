"""A discrete-event simulation of plans: when each action runs, given what each costs.

Each stage is a coroutine that runs its actions in order and stops where the input it needs has not been computed yet. The
coroutines are resumed in turns until all have finished. That order decides nothing: an action starts when its stage is free
and its input has arrived, whichever stage was resumed first. So no queue of events is needed, and the time is linear in
the number of actions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from paci_megatron.schedule.actions import COMPUTE_KINDS, Action, Kind


@dataclass(frozen=True)
class StageCosts:
    """Seconds that one stage takes for a micro-batch's forward and whole backward (all its chunks together) and an update.

    ``weight_s`` is the part of the backward that computes weight gradients, half of it if None; only the zero-bubble
    schedules run it apart.
    """

    forward_s: float
    backward_s: float
    weight_s: float | None = None
    update_s: float = 0

    @property
    def weight_gradient_s(self) -> float:
        """``weight_s``, whether given or not."""
        return self.backward_s / 2 if self.weight_s is None else self.weight_s

    def seconds(self, kind: Kind) -> float:
        """What an action of this kind takes."""
        return {
            Kind.FORWARD: self.forward_s,
            Kind.BACKWARD: self.backward_s,
            Kind.INPUT_GRADIENT: self.backward_s - self.weight_gradient_s,
            Kind.WEIGHT_GRADIENT: self.weight_gradient_s,
            Kind.UPDATE: self.update_s,
        }[kind]


@dataclass(frozen=True)
class Costs:
    """What everything takes. Transfers overlap compute: a message occupies its link, one for each direction between two
    neighbours, for ``message_bytes / bandwidth_bytes_per_s`` and arrives ``latency_s`` later.

    With ``jitter`` J every action takes between 1-J and 1+J of its time, evenly distributed; the same ``seed`` gives the
    same times.
    """

    stages: tuple[StageCosts, ...]
    latency_s: float = 0
    message_bytes: float = 0
    bandwidth_bytes_per_s: float = math.inf
    jitter: float = 0
    seed: int = 0

    @property
    def link_s(self) -> float:
        """How long a message occupies its link."""
        return self.message_bytes / self.bandwidth_bytes_per_s if self.message_bytes else 0


@dataclass(frozen=True, slots=True)
class Span:
    """An action with its start and end, in seconds since the start of the simulation or measurement. ``waiting_s`` is how
    long the stage has waited for its input just before, where that was measured."""

    action: Action
    start_s: float
    end_s: float
    waiting_s: float = 0


class _Mark(NamedTuple):
    """A stage's state at the end of an update: the time, and its backwards and the sum of their drifts so far."""

    end_s: float
    backwards: int
    drift_sum: int


@dataclass
class StageRun:
    """What one stage did, or in a V one process. ``peak_in_flight`` counts activations of one micro-batch on one chunk, held
    until the backward is complete. Drift is in updates, by the weights the stage has, whether or not the schedule keeps
    older ones. ``marks[k]`` is taken after update k, in a V after chunk 0's, the later; ``marks[0]`` at the start."""

    busy_s: float = 0
    end_s: float = 0
    peak_in_flight: int = 0
    max_drift: int = 0
    marks: list[_Mark] = field(default_factory=lambda: [_Mark(0, 0, 0)])
    spans: list[Span] = field(default_factory=list)


@dataclass
class Simulation:
    """What :func:`simulate` found, for each stage."""

    stages: list[StageRun]
    chunks: int = 1

    @property
    def makespan_s(self) -> float:
        """Seconds from the start to the end of the last action."""
        return max(stage.end_s for stage in self.stages)

    def bubble_fraction(self, stage_index: int) -> float:
        """The share of the makespan that the stage does not compute, in [0, 1]."""
        return 1 - self.stages[stage_index].busy_s / self.makespan_s if self.makespan_s else 0.0

    def mean_bubble_fraction(self) -> float:
        """The mean of :meth:`bubble_fraction` over the stages."""
        return sum(self.bubble_fraction(stage) for stage in range(len(self.stages))) / len(self.stages)

    def peak_activations(self, stage_index: int) -> float:
        """The most that the stage holds at a time, in activations of one micro-batch on the whole stage."""
        return self.stages[stage_index].peak_in_flight / self.chunks

    def microbatches_per_s(self, after_update: int = 0, up_to_update: int = -1) -> float:
        """Throughput from the end of one update to that of another (-1 for the last), on the stage that ends it last."""
        first, last = (max(stage.marks[k].end_s for stage in self.stages) for k in (after_update, up_to_update))
        marks = self.stages[0].marks
        return (marks[up_to_update].backwards - marks[after_update].backwards) / self.chunks / (last - first)

    def mean_drift(self, stage_index: int, after_update: int = 0) -> float:
        """The mean over the backwards since ``after_update``."""
        marks = self.stages[stage_index].marks
        backwards = marks[-1].backwards - marks[after_update].backwards
        return (marks[-1].drift_sum - marks[after_update].drift_sum) / backwards


class _Route(NamedTuple):
    """How an action runs: its duration, where its input arrives and where its output goes, if anywhere, and over which of
    the stage's links: that of activations or of gradients, or none where the output stays, at the turns of a V.
    """

    duration_s: float
    inbox: dict[int, float] | None = None
    outbox: dict[int, float] | None = None
    link: Kind | None = None


_Routes = list[dict[Kind, _Route]]
"""By chunk and kind."""


def simulate(
    plans: Sequence[Iterable[Action]],
    costs: Costs,
    *,
    chunks: int = 1,
    folded: bool = False,
    last_update: int | None = None,
    record: bool = False,
    allow_deadlock: bool = False,
) -> Simulation:
    """Run the plans, one per stage, to their ends or up to ``last_update``, in which case they may be endless.

    Transfer actions are implied by the others and ignored. ``folded`` is for two chunks in a V (schedule/vee.py), each with
    its own updates. ``record`` keeps the spans. ``ValueError`` if some stage waits for ever, unless ``allow_deadlock``.
    """
    if len(plans) != len(costs.stages):
        raise ValueError(f"{len(plans)} plans and costs of {len(costs.stages)} stages: give one StageCosts a plan")
    simulation = Simulation([StageRun() for _ in plans], chunks)
    runners = [
        _run(plan, routes, run, costs, stage, last_update, record)
        for stage, (plan, routes, run) in enumerate(
            zip(plans, _routes(costs.stages, chunks, folded), simulation.stages, strict=True)
        )
    ]
    # Dependencies run both ways along the pipeline, and so do the turns: to and fro.
    waiting, progress = list(enumerate(runners)), True
    while waiting and progress:
        progress = False
        still_waiting = []
        for stage, runner in reversed(waiting):
            moved = next(runner, None)
            progress |= moved is not False
            if moved is not None:
                still_waiting.append((stage, runner))
        waiting = still_waiting
    if waiting and not allow_deadlock:
        stuck = sorted(stage for stage, _ in waiting)
        raise ValueError(f"stages {stuck} wait for ever: the plans do not match")
    return simulation


def _routes(stages: Sequence[StageCosts], chunks: int, folded: bool) -> list[_Routes]:
    """For each stage. Chunk c of stage s is part c*N+s of the model, in a V chunk 1 is part 2N-1-s; activations go up these
    parts, gradients down.
    """
    num_stages, parts = len(stages), len(stages) * chunks
    activations: list[dict[int, float]] = [{} for _ in range(parts)]
    gradients: list[dict[int, float]] = [{} for _ in range(parts)]

    def route(index: int, chunk: int, kind: Kind) -> _Route:
        stage, rises = stages[index], folded and chunk == 1
        part = parts - 1 - index if rises else chunk * num_stages + index
        if kind is Kind.UPDATE:
            return _Route(stage.update_s / chunks if folded else stage.update_s)
        duration_s = stage.seconds(kind) if chunks == 1 else stage.seconds(kind) / chunks
        if kind is Kind.WEIGHT_GRADIENT:
            return _Route(duration_s)
        step, boxes = (1, activations) if kind is Kind.FORWARD else (-1, gradients)
        first, last = (0, parts - 1) if step == 1 else (parts - 1, 0)
        # Up the second half of a V activations go where gradients go down the first.
        link = (Kind.BACKWARD if rises else Kind.FORWARD) if step == 1 else (Kind.FORWARD if rises else Kind.BACKWARD)
        stays = folded and {part, part + step} == {num_stages - 1, num_stages}
        return _Route(
            duration_s,
            None if part == first else boxes[part],
            None if part == last else boxes[part + step],
            None if stays or part == last else link,
        )

    return [
        [{kind: route(index, chunk, kind) for kind in COMPUTE_KINDS} for chunk in range(chunks)]
        for index in range(num_stages)
    ]


def _run(
    actions: Iterable[Action], routes: _Routes, run: StageRun, costs: Costs, stage: int, last: int | None, record: bool
) -> Iterator[bool]:
    """One stage. Yields wherever it has to wait, and says whether it did anything since it last yielded.

    The innermost loop of everything: kept in one function, with local variables, for speed.
    """
    now: float = 0
    moved, random = False, Random(f"{costs.seed}/{stage}")
    backwards = drift_sum = 0
    # A backward is matched with its forward by counting: they come in the same order on each chunk, except between flushes,
    # where there is no drift. forwards_before holds the forwards done at each update that no backward has reached yet.
    forwards, inputs, version, forward_version = ([0] * len(routes) for _ in range(4))
    forwards_before = [deque[int]() for _ in routes]
    link_s, latency_s, jitter = costs.link_s, costs.latency_s, costs.jitter
    link_free_s = dict.fromkeys(Kind, 0.0)
    for action in actions:
        kind, index, chunk = action.kind, action.index, action.chunk
        route = routes[chunk].get(kind)
        if route is None:
            continue
        duration_s, inbox, outbox, link = route
        if inbox is not None:
            while (arrival_s := inbox.pop(index, None)) is None:
                yield moved
                moved = False
            now = max(now, arrival_s)
        moved = True
        if jitter:
            duration_s *= 1 + jitter * (2 * random.random() - 1)
        if record:
            run.spans.append(Span(action, now, now + duration_s))
        run.busy_s += duration_s
        run.end_s = now = now + duration_s
        if link is not None:
            sent_s = link_free_s[link] = max(now, link_free_s[link]) + link_s
        if outbox is not None:
            outbox[index] = now if link is None else sent_s + latency_s
        if kind is Kind.FORWARD:
            forwards[chunk] += 1
            run.peak_in_flight = max(run.peak_in_flight, sum(forwards) - backwards)
        elif kind is Kind.UPDATE:
            version[chunk] += 1
            forwards_before[chunk].append(forwards[chunk])
            if chunk == 0:
                run.marks.append(_Mark(now, backwards, drift_sum))
            if chunk == 0 and index == last:
                return
        else:
            if kind is not Kind.WEIGHT_GRADIENT:
                while forwards_before[chunk] and forwards_before[chunk][0] <= inputs[chunk]:
                    forwards_before[chunk].popleft()
                    forward_version[chunk] += 1
                inputs[chunk] += 1
                drift = version[chunk] - forward_version[chunk]
                drift_sum += drift
                run.max_drift = max(run.max_drift, drift)
            if kind is not Kind.INPUT_GRADIENT:
                backwards += 1
