"""How messages travel in a simulation: over lines with latency and bandwidth, and with what waits for them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

from paci_megatron.schedule.actions import COMPUTE_KINDS, Action, Kind

from .costs import Costs

FLUSH_ALL_REDUCES = 5
"""Over all stages, one after the other, in each of Megatron's iterations: whether to run it again, the gradient norm,
whether all stages may step, the largest norm, the learning rate."""


class Line:
    """One direction between two neighbours, which carries one message after the other."""

    __slots__ = ("free_s", "latency_s", "link_s")

    def __init__(self, latency_s: float, link_s: float) -> None:
        self.latency_s, self.link_s, self.free_s = latency_s, link_s, 0.0

    def arrival_s(self, ready_s: float) -> float:
        """When a message arrives that may leave at ``ready_s``; to be asked once for each."""
        self.free_s = max(ready_s, self.free_s) + self.link_s
        return self.free_s + self.latency_s


class Wire:
    """The messages from one part of the model to the next, over a line, or over none where both are in one process.

    ``sent`` has when each arrives, or with handshakes when it was handed over, and ``posted`` when its receive was posted.
    """

    __slots__ = ("line", "posted", "sent")

    def __init__(self, line: Line | None) -> None:
        self.line = line
        self.sent: dict[int, float] = {}
        self.posted: dict[int, float] = {}

    def leaves_s(self, index: int, sent_s: float) -> float:
        """With handshakes, when a message may leave: its sender knows of the receive."""
        return max(sent_s, self.posted[index] + self.line.latency_s) if self.line is not None else sent_s


class Route(NamedTuple):
    """How an action runs: its duration, where its input comes from and where its output goes, if anywhere."""

    duration_s: float
    inbox: Wire | None = None
    outbox: Wire | None = None


Routes = list[dict[Kind, Route]]
"""By chunk and kind."""


def make_routes(costs: Costs, chunks: int, folded: bool) -> list[Routes]:
    """For each stage. Chunk c of stage s is part c*N+s of the model, in a V chunk 1 is part 2N-1-s; activations go up these
    parts, gradients down.
    """
    num_stages = len(costs.stages)
    parts = num_stages * chunks
    lines: dict[tuple[int, int], Line] = {}

    def stage_of(part: int) -> int:
        return min(part, parts - 1 - part) if folded else part % num_stages

    def wire(part: int, to: int) -> Wire:
        source, target = stage_of(part), stage_of(to)
        if source == target:
            return Wire(None)
        # From the last stage to the first one way, of a schedule with several chunks: over all links.
        between = slice(min(source, target), max(source, target))
        cost = max(costs.latencies_s[between]), max(costs.links_s[between])
        return Wire(lines.setdefault((source, target), Line(*cost)))

    # Before each part and after the last: none at the ends of the model.
    activations = [None, *(wire(part, part + 1) for part in range(parts - 1)), None]
    gradients = [None, *(wire(part + 1, part) for part in range(parts - 1)), None]

    def route(stage: int, chunk: int, kind: Kind) -> Route:
        part = parts - 1 - stage if folded and chunk == 1 else chunk * num_stages + stage
        duration_s = costs.stages[stage].seconds(kind)
        if kind is Kind.UPDATE:
            return Route(duration_s / chunks if folded else duration_s)
        if chunks > 1:
            duration_s /= chunks
        if kind is Kind.WEIGHT_GRADIENT:
            return Route(duration_s)
        if kind is Kind.FORWARD:
            return Route(duration_s, activations[part], activations[part + 1])
        return Route(duration_s, gradients[part + 1], gradients[part])

    return [
        [{kind: route(stage, chunk, kind) for kind in COMPUTE_KINDS} for chunk in range(chunks)]
        for stage in range(num_stages)
    ]


class Meeting:
    """Where all stages wait for each other at an update of Megatron's, for collectives one after the other."""

    def __init__(self, latencies_s: Sequence[float]) -> None:
        self._num_stages = len(latencies_s) + 1
        self._takes_s = FLUSH_ALL_REDUCES * _all_reduce_s(latencies_s)
        self._arrived: dict[int, list[float]] = {}

    def arrive(self, update: int, now: float) -> None:
        """A stage is there."""
        self._arrived.setdefault(update, []).append(now)

    def end_s(self, update: int) -> float | None:
        """When all may go on; None as long as somebody is missing."""
        arrived = self._arrived[update]
        return max(arrived) + self._takes_s if len(arrived) == self._num_stages else None


def _all_reduce_s(latencies_s: Sequence[float]) -> float:
    """gloo's, of a number: 2(N-1) messages one after the other round a ring that the longest way closes."""
    ring = [*latencies_s, sum(latencies_s)]
    steps = 2 * len(latencies_s)
    return max(sum(ring[(start + step) % len(ring)] for step in range(steps)) for start in range(len(ring)))


MESSAGES = (Kind.RECV_FORWARD, Kind.SEND_FORWARD, Kind.RECV_BACKWARD, Kind.SEND_BACKWARD)
"""What :class:`Transfers` performs."""

_PAIRED = {Kind.SEND_FORWARD: Kind.RECV_BACKWARD, Kind.SEND_BACKWARD: Kind.RECV_FORWARD}
"""What Megatron's calls post together: a send and the receive from the same neighbour."""


class Transfers:
    """The transfer actions of a stage, with handshakes."""

    def __init__(self, routes: Routes, waits_for_sends: bool) -> None:
        self._routes = routes
        self._waits_for_sends = waits_for_sends
        self._sent: tuple[Kind, Wire, int, float] | None = None

    def perform(self, action: Action, now: float) -> Generator[bool, None, float]:
        """Post a receive or hand over a message; when the stage goes on."""
        kind, index = action.kind, action.index
        if self._sent is not None and _PAIRED[self._sent[0]] is not kind:
            now = yield from self.wait(now)
        routes = self._routes[action.chunk]
        if kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            wire = routes[Kind.FORWARD if kind is Kind.RECV_FORWARD else Kind.BACKWARD].inbox
            if wire is not None:
                wire.posted[index] = now
        else:
            wire = routes[Kind.FORWARD if kind is Kind.SEND_FORWARD else Kind.BACKWARD].outbox
            if wire is not None:
                wire.sent[index] = now
                self._sent = (kind, wire, index, now) if self._waits_for_sends else None
        return now

    def wait(self, now: float) -> Generator[bool, None, float]:
        """Until the last message has left, if that is waited for."""
        if self._sent is not None:
            _, wire, index, sent_s = self._sent
            self._sent = None
            moved = True
            while index not in wire.posted:
                yield moved
                moved = False
            now = max(now, wire.leaves_s(index, sent_s))
        return now
