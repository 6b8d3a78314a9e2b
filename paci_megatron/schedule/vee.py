"""PACI-V: PACI over twice as many stages of half the size, folded into a V, so that every process holds about the same.

Process r of N holds stages r (chunk 0) and 2N-1-r (chunk 1) of 2N. A micro-batch passes it four times: down the V and up
it forward, down and up again backward. Without a flush every process can repeat one fixed order of these four actions, one
micro-batch after the other, and never idle. :func:`fold` finds the orders that pass a micro-batch on soonest, and with
them what is in flight; stage by stage the result is PACI with that slack (:func:`~.schedules.paci`), drains and all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise, permutations

from .actions import Action, Kind, shared_action
from .schedules import IsDrain, never

WAY = ((Kind.FORWARD, 0), (Kind.FORWARD, 1), (Kind.BACKWARD, 1), (Kind.BACKWARD, 0))
"""How a micro-batch passes a process: kind and chunk."""

LONGEST = 16
"""The most that a forward and backward may make: the search takes the square of it."""

Begins = tuple[int, int, int, int]
"""When a process begins a micro-batch's four actions, in the order of its way."""


@dataclass(frozen=True)
class Fold:
    """The order of every process: ``begins`` has, by process, when it begins its actions on micro-batch 0 in a pipeline of
    equal stages, whose forwards and backwards take as long as it says; those on micro-batch m come m periods later.
    """

    forward: int
    backward: int
    begins: tuple[Begins, ...]

    @property
    def period(self) -> int:
        """The time of all four actions."""
        return 2 * (self.forward + self.backward)

    @property
    def num_stages(self) -> int:
        """Two for each process."""
        return 2 * len(self.begins)

    def stage_of(self, process: int, chunk: int) -> int:
        """The stage that is this chunk of the process."""
        return self.num_stages - 1 - process if chunk else process

    def place(self, stage_index: int) -> tuple[int, int]:
        """The stage's process and chunk."""
        process = min(stage_index, self.num_stages - 1 - stage_index)
        return process, int(stage_index != process)

    def begin(self, process: int, action: Action) -> int:
        """When the process begins a forward or backward."""
        return self.begins[process][WAY.index((action.kind, action.chunk))] + action.index * self.period

    def in_flight(self, stage_index: int) -> int:
        """The most micro-batches that are forwarded and not yet backwarded at a stage, of half the size."""
        process, chunk = self.place(stage_index)
        first, second, third, fourth = self.begins[process]
        lasts = third - second if chunk else fourth - first
        return -(-lasts // self.period)

    @cached_property
    def slack(self) -> tuple[int, ...]:
        """By link between stages, for PACI's rule to have as many in flight; see :func:`~.schedules.max_in_flight`."""
        held = [self.in_flight(stage) for stage in range(self.num_stages)]
        return tuple(before - after - 1 for before, after in pairwise(held))

    def peak(self, process: int) -> int:
        """The most that a process holds at a time of both its stages, in activations of half the size."""
        first, second, third, fourth = self.begins[process]

        def held(at: int) -> int:  # by the forward that begins at this moment too
            return sum(
                (at - begin) // self.period - (at - end) // self.period for begin, end in ((first, fourth), (second, third))
            )

        return max(held(first), held(second))


@lru_cache(maxsize=64)
def fold(num_processes: int, forward: int = 1, backward: int = 2, wait: int = 0) -> Fold:
    """The orders for ``num_processes`` and a forward and backward of these lengths, small integers, of which only the ratio
    counts. Between two processes a tensor has at least ``wait`` of that time until it is needed.

    Each process fills its period with the four actions in some order. Of all orders of all processes these are the ones by
    which the first process has a micro-batch in flight for the shortest time, found as the shortest path from the last
    process to the first; of those that are as good for some order of the first, the ones with the least peak.
    """
    if num_processes < 1:
        raise ValueError(f"a V of {num_processes} processes: give at least 1")
    if not (forward >= 1 and backward >= 1 and forward + backward <= LONGEST and wait >= 0):
        raise ValueError(
            f"no V for a forward and backward of {forward}:{backward} and a wait of {wait}: give whole lengths from 1 that "
            f"make at most {LONGEST} together, and a wait of at least 0"
        )
    period = 2 * (forward + backward)
    after = partial(_after, period)

    def hop(here: Begins, there: Begins) -> tuple[int, int]:
        """What a micro-batch waits between a process and the next, on chunk 0 and on chunk 1."""
        down = after(here[0] + forward, there[0], wait) + after(there[3] + backward, here[3], wait)
        up = after(there[1] + forward, here[1], wait) + after(here[2] + backward, there[2], wait)
        return down, up

    packings = _packings((forward, forward, backward, backward))
    # What a micro-batch waits from a process's chunk 0 on until it is back, and the part of that on chunks 1.
    waits = {p: (after(p[0] + forward, p[1]) + after(p[2] + backward, p[3]), 0) for p in packings}
    paths: dict[Begins, tuple[Begins, ...]] = {p: (p,) for p in packings}
    hops = {(here, there): hop(here, there) for here in packings for there in packings}
    for _ in range(num_processes - 1):
        best = {}
        for here in packings:
            options = ((waits[q][0] + sum(hops[here, q]), waits[q][1] + hops[here, q][1], q) for q in packings)
            best[here] = min(options)
        paths = {here: (here, *paths[there]) for here, (_, _, there) in best.items()}
        waits = {here: (total, up) for here, (total, up, _) in best.items()}

    def peaks(candidate: Fold) -> tuple[int, int]:
        held = [candidate.peak(process) for process in range(num_processes)]
        return max(held), sum(held)

    folds = (_unrolled(path, forward, backward, wait) for here, path in paths.items() if here[0] == 0)
    return min(folds, key=peaks)


def _after(period: int, end: int, begin: int, least: int = 0) -> int:
    """The shortest wait of at least ``least`` from ``end`` until an action that begins at ``begin`` in each period."""
    return (begin - end - least) % period + least


def _unrolled(path: Sequence[Begins], forward: int, backward: int, wait: int) -> Fold:
    """The fold of each process's packing of one period: the times of a micro-batch on its way."""
    begins = [[0] * 4 for _ in path]
    now = 0
    for step, length in enumerate((forward, forward, backward, backward)):
        processes = range(len(path)) if step % 2 == 0 else reversed(range(len(path)))
        for position, process in enumerate(processes):
            now += _after(2 * (forward + backward), now, path[process][step], wait if position else 0)
            begins[process][step] = now
            now += length
    return Fold(forward, backward, tuple((b[0], b[1], b[2], b[3]) for b in begins))


def _packings(lengths: tuple[int, ...]) -> list[Begins]:
    """Every way to fill a period with the four actions."""
    packings = []
    for order in permutations((1, 2, 3)):
        for shift in range(sum(lengths)):
            begins, now = [shift] * 4, shift + lengths[0]
            for at in order:
                begins[at] = now % sum(lengths)
                now += lengths[at]
            packings.append((begins[0], begins[1], begins[2], begins[3]))
    return packings


def paci_v(process: int, folded: Fold, microbatches_per_update: int, is_drain: IsDrain = never) -> Iterator[Action]:
    """What a process computes, without end: the four streams of actions in the order in which they begin.

    None goes beyond a drain before all have come to it. A stage's update follows its a-th backward, but for one at a drain,
    which needs the sums over all stages, and so the end of the process's other stage: there both updates come last.
    """
    a = microbatches_per_update
    done = [0] * 4

    def begin(stream: int) -> int:
        return folded.begins[process][stream] + done[stream] * folded.period

    def may_go_on(stream: int) -> bool:
        reached = done[stream]
        return reached == min(done) or reached % a != 0 or not is_drain(reached // a)

    while True:
        stream = next(filter(may_go_on, sorted(range(4), key=begin)))
        kind, chunk = WAY[stream]
        yield shared_action(kind, done[stream], chunk)
        done[stream] += 1
        if kind is Kind.BACKWARD and done[stream] % a == 0:
            update = done[stream] // a
            drains = is_drain(update)
            if chunk == 1 and not drains:
                yield shared_action(Kind.UPDATE, update, 1)
            elif chunk == 0:
                if drains:
                    yield shared_action(Kind.UPDATE, update, 1)
                yield shared_action(Kind.UPDATE, update)


def with_messages(
    actions: Iterable[Action], process: int, folded: Fold, microbatches_per_update: int, is_drain: IsDrain = never
) -> Iterator[Action]:
    """``actions`` of :func:`paci_v` with the transfers between stages and the records, see records.py.

    A receive is posted before the first action that begins later than the one that makes what is sent. So whatever waits
    for an action, an input, a receive to be posted or a device that is free, begins later than that action, and nothing can
    wait in a circle, whichever actions need the whole device. Between two stages of one process nothing is pending.
    """
    a, last_stage, in_flight = microbatches_per_update, folded.num_stages - 1, folded.in_flight(0)
    posted = {(kind, chunk): 0 for kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD) for chunk in (0, 1)}
    drained = 0
    totals = [1, 1]  # the next, by chunk

    def receives(now: int) -> Iterator[Action]:
        for (kind, chunk), microbatch in posted.items():
            sent = _sent(folded, process, kind, chunk)
            while sent is not None and sent + microbatch * folded.period < now:
                if microbatch % a == 0 and microbatch > drained and is_drain(microbatch // a):
                    break
                yield Action(kind, microbatch, chunk)
                microbatch += 1
            posted[kind, chunk] = microbatch

    for action in actions:
        kind, index, chunk = action.kind, action.index, action.chunk
        if kind is Kind.UPDATE:
            if is_drain(index):
                for of in (0, 1):
                    while totals[of] <= index:
                        yield Action(Kind.TOTAL, totals[of], of)
                        totals[of] += 1
                drained = index * a
            yield action
            continue
        yield from receives(folded.begin(process, action))
        yield action
        stage = folded.stage_of(process, chunk)
        if kind is Kind.FORWARD:
            if stage != last_stage:
                yield Action(Kind.SEND_FORWARD, index, chunk)
            if index == totals[chunk] * a - 1 + in_flight:
                yield Action(Kind.TOTAL, totals[chunk], chunk)
                totals[chunk] += 1
        else:
            if stage != 0:
                yield Action(Kind.SEND_BACKWARD, index, chunk)
            if (index + 1) % a == 0:
                # A report waits for the device too, and so for the gradient just sent.
                yield from receives(folded.begin(process, action) + folded.backward)
                yield Action(Kind.REPORT, (index + 1) // a, chunk)


def _sent(folded: Fold, process: int, kind: Kind, chunk: int) -> int | None:
    """When the action begins that makes what the process receives first in this way; None if it receives nothing so."""
    made = Kind.FORWARD if kind is Kind.RECV_FORWARD else Kind.BACKWARD
    stage = folded.stage_of(process, chunk) + (-1 if made is Kind.FORWARD else 1)
    if not 0 <= stage < folded.num_stages:
        return None
    sender, its_chunk = folded.place(stage)
    return folded.begins[sender][WAY.index((made, its_chunk))]


def forward_pass(process: int, folded: Fold, microbatches: int) -> Iterator[Action]:
    """What a process does, transfers included, to pass so many micro-batches through an empty pipeline, forward only.

    In the order that they have in training, so here too nothing waits in a circle.
    """
    every = (shared_action(Kind.FORWARD, microbatch, chunk) for microbatch in range(microbatches) for chunk in (0, 1))
    forwards = sorted(every, key=partial(folded.begin, process))
    kinds = (Kind.RECV_FORWARD, Kind.FORWARD, Kind.SEND_FORWARD)
    messages = with_messages(forwards, process, folded, microbatches, lambda update: True)
    return (action for action in messages if action.kind in kinds)
