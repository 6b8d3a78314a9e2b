"""A discrete-event simulation of plans: when each action runs, given what each costs.

Each stage is a coroutine that runs its actions in order and stops where the input it needs has not been computed yet. The
coroutines are resumed in turns until all have finished. That order decides nothing: an action starts when its stage is free
and its input has arrived, whichever stage was resumed first. So no queue of events is needed, and the time is linear in
the number of actions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from paci_megatron.schedule.actions import Action, Kind

from .costs import Costs
from .transfers import MESSAGES, Meeting, Routes, Transfers, make_routes


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


def simulate(
    plans: Sequence[Iterable[Action]],
    costs: Costs,
    *,
    chunks: int = 1,
    folded: bool = False,
    last_update: int | None = None,
    record: bool = False,
    allow_deadlock: bool = False,
    synchronous: bool = False,
    waits_for_sends: bool = False,
) -> Simulation:
    """Run the plans, one per stage, to their ends or up to ``last_update``, in which case they may be endless.

    Without ``costs.handshakes`` transfer actions are implied by the others and ignored. With them, ``waits_for_sends`` is
    Megatron's way: a stage waits for each send, or at once for it and the receive from the same neighbour that follows it;
    and with ``synchronous`` every update waits for all stages. ``folded`` is for two chunks in a V (schedule/vee.py), each
    with its own updates. ``record`` keeps the spans. ``ValueError`` if some stage waits for ever, unless ``allow_deadlock``.
    """
    if len(plans) != len(costs.stages):
        raise ValueError(f"{len(plans)} plans and costs of {len(costs.stages)} stages: give one StageCosts a plan")
    simulation = Simulation([StageRun() for _ in plans], chunks)
    meeting = Meeting(costs.latencies_s) if synchronous and costs.handshakes else None
    runners = []
    for stage, (plan, routes) in enumerate(zip(plans, make_routes(costs, chunks, folded), strict=True)):
        transfers = Transfers(routes, waits_for_sends) if costs.handshakes else None
        random = Random(f"{costs.seed}/{stage}")
        counts = _Counts(simulation.stages[stage], chunks)
        runners.append(_run(plan, routes, transfers, meeting, counts, costs.jitter, random, last_update, record))
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


class _Counts:
    """What one stage has done and what it holds.

    A backward is matched with its forward by counting: they come in the same order on each chunk, except between flushes,
    where there is no drift.
    """

    def __init__(self, run: StageRun, chunks: int) -> None:
        self.run = run
        self._backwards = self._drift_sum = 0
        self._forwards, self._inputs, self._version, self._forward_version = ([0] * chunks for _ in range(4))
        # The forwards done at each update that no backward has reached yet.
        self._forwards_before = [deque[int]() for _ in range(chunks)]

    def count(self, kind: Kind, chunk: int, now: float) -> None:
        """An action of this kind ends."""
        run = self.run
        if kind is Kind.FORWARD:
            self._forwards[chunk] += 1
            run.peak_in_flight = max(run.peak_in_flight, sum(self._forwards) - self._backwards)
        elif kind is Kind.UPDATE:
            self._version[chunk] += 1
            self._forwards_before[chunk].append(self._forwards[chunk])
            if chunk == 0:
                run.marks.append(_Mark(now, self._backwards, self._drift_sum))
        else:
            if kind is not Kind.WEIGHT_GRADIENT:
                before = self._forwards_before[chunk]
                while before and before[0] <= self._inputs[chunk]:
                    before.popleft()
                    self._forward_version[chunk] += 1
                self._inputs[chunk] += 1
                drift = self._version[chunk] - self._forward_version[chunk]
                self._drift_sum += drift
                run.max_drift = max(run.max_drift, drift)
            if kind is not Kind.INPUT_GRADIENT:
                self._backwards += 1


def _run(
    actions: Iterable[Action],
    routes: Routes,
    transfers: Transfers | None,
    meeting: Meeting | None,
    counts: _Counts,
    jitter: float,
    random: Random,
    last: int | None,
    record: bool,
) -> Iterator[bool]:
    """One stage. Yields wherever it has to wait, and says whether it did anything since it last yielded.

    The innermost loop of everything, with local variables for speed.
    """
    now: float = 0
    moved, run = False, counts.run
    for action in actions:
        kind, index, chunk = action.kind, action.index, action.chunk
        route = routes[chunk].get(kind)
        if route is None:
            if transfers is not None and kind in MESSAGES:
                now = yield from transfers.perform(action, now)
            continue
        duration_s, inbox, outbox = route
        if transfers is not None:
            now = yield from transfers.wait(now)
        if inbox is not None:
            while (arrival_s := inbox.sent.pop(index, None)) is None:
                yield moved
                moved = False
            if transfers is not None and inbox.line is not None:
                arrival_s = inbox.line.arrival_s(inbox.leaves_s(index, arrival_s))
            now = max(now, arrival_s)
        if kind is Kind.UPDATE and meeting is not None:
            meeting.arrive(index, now)
            moved = True
            while (end_s := meeting.end_s(index)) is None:
                yield moved
                moved = False
            now = end_s
        moved = True
        if jitter:
            duration_s *= 1 + jitter * (2 * random.random() - 1)
        if record:
            run.spans.append(Span(action, now, now + duration_s))
        run.busy_s += duration_s
        run.end_s = now = now + duration_s
        if outbox is not None and transfers is None:
            outbox.sent[index] = now if outbox.line is None else outbox.line.arrival_s(now)
        counts.count(kind, chunk, now)
        if kind is Kind.UPDATE and chunk == 0 and index == last:
            return
