"""How long a message takes between two neighbouring stages, measured while the pipeline is empty."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from .groups import Direction

ROUNDS = 5


class LinkTimes(NamedTuple):
    """Seconds that a message of no size takes one way, and that one of an activation's size takes beyond that."""

    latency_s: float = 0.0
    message_s: float = 0.0


def measure(there: Direction, back: Direction, like: torch.Tensor) -> LinkTimes:
    """Of the link with these two directions, for messages like ``like``. Called on both its ranks.

    From a round trip: the least of some, the first of which, and those that another process held up, are longer.
    """
    small, whole = (_round_trip_s(there, back, tensor) for tensor in (like.new_zeros(1), like))
    return LinkTimes(small / 2, max(whole - small, 0.0) / 2)


def _round_trip_s(there: Direction, back: Direction, like: torch.Tensor) -> float:
    begins = there.is_outgoing
    out, into = (there, back) if begins else (back, there)
    sends: list[Any] = []
    shortest = float("inf")

    def post() -> tuple[torch.Tensor, Any]:
        buffer = torch.empty_like(like)
        return buffer, dist.irecv(buffer, src=into.sender, group=into.group)

    def send() -> None:
        sends.append(dist.isend(like, dst=out.receiver, group=out.group))

    posted = post()
    for turn in range(ROUNDS):
        since = time.perf_counter()
        if begins:
            send()
        buffer, work = posted
        work.wait()
        buffer.view(-1)[0].item()  # a device has it, and not only its stream
        shortest = min(shortest, time.perf_counter() - since)
        if turn + 1 < ROUNDS:
            posted = post()  # before the message that lets the other side go on, which then finds it there
        if not begins:
            send()
    for work in sends:
        work.wait()
    return shortest
