"""The schedules that PACI is compared with, by the name a command line gives them. For simulation: nothing executes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from paci_megatron.schedule.actions import Action, Kind, shared_action
from paci_megatron.schedule.schedules import one_f_one_b_flush, paci, parse_slack, with_transfers
from paci_megatron.schedule.vee import fold, paci_v

from .costs import Costs
from .engine import Simulation, simulate


def interleaved(stage_index: int, num_stages: int, microbatches_per_update: int, chunks: int) -> Iterator[Action]:
    """Interleaved 1F1B with ``chunks`` model chunks a stage and a flush before every update, without end.

    The order of Megatron's ``forward_backward_pipelining_with_interleaving``: micro-batches go through in groups of
    ``num_stages``, each group through the first chunk, then the second, and backward through the last chunk first.
    """
    a = microbatches_per_update
    warmup = min(2 * (num_stages - stage_index - 1) + (chunks - 1) * num_stages, a * chunks)

    def step(kind: Kind, update: int, position: int) -> Action:
        group, within = divmod(position, num_stages * chunks)
        chunk, offset = divmod(within, num_stages)
        chunk = chunk if kind is Kind.FORWARD else chunks - 1 - chunk
        return shared_action(kind, update * a + group * num_stages + offset, chunk)

    update = 0
    while True:
        for i in range(warmup):
            yield step(Kind.FORWARD, update, i)
        for i in range(warmup, a * chunks):
            yield step(Kind.FORWARD, update, i)
            yield step(Kind.BACKWARD, update, i - warmup)
        for i in range(a * chunks - warmup, a * chunks):
            yield step(Kind.BACKWARD, update, i)
        update += 1
        yield shared_action(Kind.UPDATE, update)


def zero_bubble(stage_index: int, num_stages: int, microbatches_per_update: int, level: int) -> Iterator[Action]:
    """Zero-bubble 1F1B, without end: ``level`` 1 is ZB-H1, 2 is ZB-H2 (Qi et al., arXiv 2401.10241, section 2).

    A stage runs ahead by N-s (2(N-s)-1) forwards and may owe s (2s) weight gradients, so what it holds is N (2N-1)
    micro-batches on every stage; the weight gradients it owes fill the time when it runs out of other work. An
    update needs the gradients of its own stage only: the clipping norm is assumed to be validated afterwards.
    """
    a = microbatches_per_update
    ahead = level * (num_stages - stage_index) - (level - 1)
    owed = level * stage_index
    update = 0
    while True:
        first = update * a
        forwards = inputs = weights = 0
        while weights < a:
            if inputs - weights > owed or inputs == a:
                yield shared_action(Kind.WEIGHT_GRADIENT, first + weights)
                weights += 1
            elif forwards < a and forwards - inputs < ahead:
                yield shared_action(Kind.FORWARD, first + forwards)
                forwards += 1
            else:
                yield shared_action(Kind.INPUT_GRADIENT, first + inputs)
                inputs += 1
        update += 1
        yield shared_action(Kind.UPDATE, update)


def paired_transfers(actions: Iterable[Action]) -> Iterator[Action]:
    """``actions`` of 1F1B with Megatron's transfers: each receive right before its use, each send at once."""
    for action in actions:
        kinds = _TRANSFERS.get(action.kind)
        if kinds is None:
            yield action
        else:
            yield Action(kinds[0], action.index, action.chunk)
            yield action
            yield Action(kinds[1], action.index, action.chunk)


def overlapped_transfers(actions: Iterable[Action]) -> Iterator[Action]:
    """``actions`` of interleaved 1F1B with Megatron's transfers (overlapped, its default): the receive of the next
    forward, or backward, with the send of the one before it.
    """
    window: list[Action] = []
    for action in actions:
        window.append(action)
        if action.kind is Kind.UPDATE:
            following = {kind: iter([each for each in window if each.kind is kind]) for kind in _TRANSFERS}
            awaited = {kind: next(following[kind]) for kind in _TRANSFERS}
            for kind, first in awaited.items():
                yield Action(_TRANSFERS[kind][0], first.index, first.chunk)
            for each in window:
                yield each
                if each.kind in _TRANSFERS:
                    receive, send = _TRANSFERS[each.kind]
                    yield Action(send, each.index, each.chunk)
                    if (awaits := next(following[each.kind], None)) is not None:
                        yield Action(receive, awaits.index, awaits.chunk)
            window = []


_TRANSFERS = {
    Kind.FORWARD: (Kind.RECV_FORWARD, Kind.SEND_FORWARD),
    Kind.BACKWARD: (Kind.RECV_BACKWARD, Kind.SEND_BACKWARD),
}


@dataclass(frozen=True)
class Schedule:
    """A schedule by name. ``actions(stage_index, num_stages, a, updates)`` is a stage's plan, which drains after ``updates``
    windows of ``a`` micro-batches. ``kept_weights`` says which older versions it keeps for backwards: none, one for each
    version in flight at the stage, or on every stage as many as the first needs. ``extra_in_flight`` is what PACI's
    ``--paci-extra-in-flight`` says. ``folded`` is for the two chunks of a V. ``transfers`` says how they are performed,
    where costs have handshakes: as PACI posts them, as Megatron does for either of its schedules, or at no more than latency
    and bandwidth.
    """

    name: str
    title: str
    actions: Callable[[int, int, int, int], Iterator[Action]]
    chunks: int = 1
    kept_weights: Literal["none", "in flight", "uniform"] = "none"
    updates_per_window: Callable[[int], int] = lambda a: 1
    extra_in_flight: str = "0"
    folded: bool = False
    transfers: Literal["ideal", "ahead", "paired", "overlapped"] = "ideal"

    def problem(self, num_stages: int, microbatches_per_update: int) -> str | None:
        """Why the schedule does not exist for this size, if it does not."""
        try:
            parse_slack(self.extra_in_flight, num_stages)
        except ValueError as error:
            return f"paci:{error}"
        if self.chunks == 1 or self.folded or (num_stages > 1 and microbatches_per_update % num_stages == 0):
            return None
        return (
            f"{self.name} does not exist for {microbatches_per_update} micro-batches per update on {num_stages} stages: "
            "Megatron interleaves multiples of the number of stages only, on two stages or more; choose such a number, or "
            "leave the schedule out"
        )

    def simulate(self, microbatches_per_update: int, updates: int, costs: Costs, record: bool = False) -> Simulation:
        """``updates`` windows from an empty pipeline to an empty pipeline, on as many stages as ``costs`` has.

        ``ValueError`` if the schedule does not exist for this size.
        """
        num_stages, a = len(costs.stages), microbatches_per_update
        problem = self.problem(num_stages, a)
        if problem:
            raise ValueError(problem)
        if self.transfers == "ideal":
            costs = replace(costs, handshakes=False)
        plans = [self.actions(stage, num_stages, a, updates) for stage in range(num_stages)]
        if costs.handshakes:
            plans = [self._with_transfers(plan, stage, num_stages, a, updates) for stage, plan in enumerate(plans)]
        return simulate(
            plans,
            costs,
            chunks=self.chunks,
            folded=self.folded,
            last_update=updates * self.updates_per_window(a),
            record=record,
            synchronous=self.transfers in ("paired", "overlapped"),
            waits_for_sends=self.transfers == "paired",
        )

    def _with_transfers(
        self, actions: Iterator[Action], stage: int, num_stages: int, a: int, updates: int
    ) -> Iterator[Action]:
        if self.transfers != "ahead":
            return paired_transfers(actions) if self.transfers == "paired" else overlapped_transfers(actions)
        slack = parse_slack(self.extra_in_flight, num_stages)
        return with_transfers(actions, stage, num_stages, a, lambda update: update == updates, slack, gradients_ahead=True)


def _paci(stage: int, num_stages: int, a: int, updates: int, extra_in_flight: str = "0") -> Iterator[Action]:
    return paci(stage, num_stages, a, lambda update: update == updates, parse_slack(extra_in_flight, num_stages))


def _pipedream(stage: int, num_stages: int, a: int, updates: int) -> Iterator[Action]:
    return _paci(stage, num_stages, 1, updates * a)


def _paci_v(stage: int, num_stages: int, a: int, updates: int, lengths: tuple[int, ...] = ()) -> Iterator[Action]:
    return paci_v(stage, fold(num_stages, *lengths), a, lambda update: update == updates)


_PLAIN = {
    "1f1b": Schedule("1f1b", "1F1B-flush", lambda stage, n, a, updates: one_f_one_b_flush(stage, n, a), transfers="paired"),
    "zb-h1": Schedule("zb-h1", "ZB-H1", lambda stage, n, a, updates: zero_bubble(stage, n, a, level=1)),
    "zb-2p": Schedule("zb-2p", "ZB-H2 (2p)", lambda stage, n, a, updates: zero_bubble(stage, n, a, level=2)),
    # Narayanan et al., arXiv 2006.09503: all micro-batches of a window use the weights of one update before it.
    "pipedream-2bw": Schedule("pipedream-2bw", "PipeDream-2BW", _paci, kept_weights="uniform"),
    # Harlap et al., arXiv 1806.03377: an update after every micro-batch, weights stashed for each in flight.
    "pipedream": Schedule("pipedream", "PipeDream", _pipedream, kept_weights="in flight", updates_per_window=lambda a: a),
    "paci": Schedule("paci", "PACI", _paci, transfers="ahead"),
    "paci-v": Schedule("paci-v", "PACI-V", _paci_v, chunks=2, folded=True),
}

NAMES = (
    "1f1b, interleaved:CHUNKS, zb-h1, zb-2p, pipedream-2bw, pipedream, paci, paci:EXTRA_IN_FLIGHT, paci-v, "
    "paci-v:FORWARD:BACKWARD:WAIT"
)


def find_schedule(name: str) -> Schedule:
    """The schedule of that name, such as ``paci`` or ``interleaved:2``; ``ValueError`` if there is none."""
    base, _, number = name.partition(":")
    if not number and base in _PLAIN:
        return _PLAIN[base]
    if base == "paci" and all(each.isdecimal() for each in number.split(",")):
        actions = partial(_paci, extra_in_flight=number)
        return Schedule(name, f"PACI, k={number}", actions, extra_in_flight=number, transfers="ahead")
    lengths = number.split(":")
    if base == "paci-v" and len(lengths) == 3 and all(each.isdecimal() for each in lengths):
        forward, backward, wait = map(int, lengths)
        fold(1, forward, backward, wait)  # ValueError if there is none
        actions = partial(_paci_v, lengths=(forward, backward, wait))
        return Schedule(name, f"PACI-V, {forward}:{backward}, wait {wait}", actions, chunks=2, folded=True)
    if number.isdecimal() and base == "interleaved" and int(number) >= 2:
        chunks = int(number)
        return Schedule(
            name, f"interleaved, v={chunks}", partial(_interleaved, chunks=chunks), chunks, transfers="overlapped"
        )
    raise ValueError(f"{name!r} is no schedule: choose from {NAMES} (at least 2 chunks)")


def _interleaved(stage: int, num_stages: int, a: int, updates: int, chunks: int) -> Iterator[Action]:
    return interleaved(stage, num_stages, a, chunks)
