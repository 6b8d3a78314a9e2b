"""The process groups by which stages in several processes reach each other, and the transport made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import lead_of_previous, sends_in_flight

from .control import Record
from .links import (
    DirectIncoming,
    DirectOutgoing,
    HostIncoming,
    HostOutgoing,
    Incoming,
    Neighbour,
    Outgoing,
    P2PLink,
    TensorPair,
)

MAX_TIED_TURNS = 8
"""PyTorch takes NCCL's streams from a pool of 32. Two communicators on one stream could wait for each other for ever."""


@dataclass(frozen=True)
class Direction:
    """A process group of two ranks that carries tensors one way only. This rank is one of the two."""

    name: str
    group: dist.ProcessGroup
    sender: int
    receiver: int

    @property
    def is_outgoing(self) -> bool:
        """Whether this rank sends."""
        return dist.get_rank() == self.sender


class Wanted(NamedTuple):
    """A process group of the rank that asks for it: its ranks, a name and a backend (None: that of the world)."""

    name: str
    ranks: tuple[int, ...]
    backend: str | None = None


MakeGroup = Callable[[Wanted], dist.ProcessGroup]
"""Makes one process group. Called on all ranks of the world, in one order."""


def new_group(wanted: Wanted) -> dist.ProcessGroup:
    """As ``torch.distributed.new_group`` makes it."""
    return dist.new_group(list(wanted.ranks), backend=wanted.backend, group_desc=wanted.name)


def create_groups(wanted: Sequence[Wanted], make: MakeGroup = new_group) -> list[dist.ProcessGroup]:
    """The process groups that this rank asks for.

    Collective over the world: every rank creates everyone's groups, in one order, whichever it is in.
    """
    everyones: list[list[Wanted]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, list(wanted))
    ordered = sorted({one for theirs in everyones for one in theirs}, key=lambda one: (one.name, one.ranks))
    created = {one: make(one) for one in ordered}
    return [created[one] for one in wanted]


def use_once(directions: Sequence[Direction], place: Callable[[int], int], device: torch.device) -> None:
    """Send something through each direction that this rank is in. Collective over a pipeline.

    Once used, whatever the backend creates at a pair's first transfer exists: NCCL's communicators, unless bound to a device
    at start, and its connections. Created later, in the order in which stages happen to need them, they could wait for
    each other for ever. Here all ranks go by one order: one name after the other, and of each first the pairs of stages that
    begin at an even one, all at once, then the others. ``place`` is the stage of a rank.
    """

    def order(direction: Direction) -> tuple[Any, ...]:
        pair = sorted((place(direction.sender), place(direction.receiver)))
        return (direction.name, pair[0] % 2, *pair)

    for direction in sorted(directions, key=order):
        _use_once(direction, device)


def _use_once(direction: Direction, device: torch.device) -> None:
    """Send the sender's rank, and wait on both sides until it is there; ``RuntimeError`` if something else arrives."""
    tensor = torch.full((1,), direction.sender if direction.is_outgoing else -1, dtype=torch.int64, device=device)
    if direction.is_outgoing:
        work = dist.isend(tensor, dst=direction.receiver, group=direction.group)
    else:
        work = dist.irecv(tensor, src=direction.sender, group=direction.group)
    assert work is not None
    work.wait()
    if int(tensor) != direction.sender:
        raise RuntimeError(
            f"rank {direction.receiver} expected a message from rank {direction.sender} and got {int(tensor)}; this is a "
            "bug in paci-megatron, please report it"
        )


class ProcessTransport:
    """A :class:`~.links.Transport` between processes that hold one stage each."""

    def __init__(
        self,
        ranks: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        record_lag: int,
        *,
        over_nccl: bool,
        through_host: bool = False,
        tied: torch.Tensor | None = None,
        make_group: MakeGroup = new_group,
        agree: Callable[[Record], Record] = lambda record: record,
    ) -> None:
        """Makes the process groups, for plans of about that record lag. Collective over the world.

        ``ranks`` are those of this pipeline, first stage to last. Activations, and their gradients, have ``shape`` and
        ``dtype`` between all stages, and lie on ``device``. ``over_nccl`` says whether a transfer is a kernel on it;
        ``through_host`` sends over gloo by way of the host's memory. ``tied`` is like the gradient that the first and the
        last stage share, where they share one and this is one of them. For ``agree`` see :meth:`.links.Transport.agree`.

        Each pair of neighbouring stages has a group for activations and one for gradients; the two that share an embedding
        have some for each direction.
        """
        self.receives_hold_device = over_nccl
        self.agree = agree
        self._ranks, self._here = list(ranks), dist.get_rank()
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._through_host, self._tied = through_host, tied
        self._make_group = make_group
        self._directions = self._create(record_lag)
        use_once(list(self._directions.values()), self._ranks.index, torch.device("cpu") if through_host else device)
        self._neighbours: tuple[tuple[int, ...], tuple[Neighbour | None, Neighbour | None]] | None = None  # and their slack
        self._pair: tuple[int, TensorPair] | None = None  # and the record lag that it is made for

    def _create(self, record_lag: int) -> dict[tuple[str, int, int], Direction]:
        """All groups of this rank, made together; directions by name, sender and receiver."""
        named: list[tuple[str, int, int]] = []
        for before, after in pairwise(self._ranks):
            if self._here in (before, after):
                named += [("PACI_ACTIVATIONS", before, after), ("PACI_GRADIENTS", after, before)]
        if self._tied is not None:
            first, last = self._ranks[0], self._ranks[-1]
            # An update's transfer is complete before the one of ``record_lag`` updates later is posted. With fewer turns
            # a GPU with one hardware queue may stand still for a while, but not for ever.
            for turn in range(min(record_lag, MAX_TIED_TURNS)):
                named += [(f"PACI_TIED_FROM_FIRST_{turn}", first, last), (f"PACI_TIED_FROM_LAST_{turn}", last, first)]
        backend = "gloo" if self._through_host else None
        # NCCL names a communicator by its ranks in order, so a group is made of the pair either way round.
        wanted = [Wanted(name, (min(by, to), max(by, to)), backend) for name, by, to in named]
        records = Wanted("PACI_RECORDS", tuple(self._ranks), "gloo")
        self._records, *groups = create_groups([records, *wanted], self._make_group)
        return {key: Direction(key[0], group, *key[1:]) for key, group in zip(named, groups, strict=True)}

    def link(self, stage_index: int, plan: Plan) -> P2PLink:
        """See :class:`~.links.Transport`."""
        if self._neighbours is None or self._neighbours[0] != plan.slack:
            self._neighbours = plan.slack, self._make_neighbours(stage_index, plan)
        return P2PLink(*self._neighbours[1], self._records, plan.record_lag)

    def _make_neighbours(self, stage: int, plan: Plan) -> tuple[Neighbour | None, Neighbour | None]:
        """The stages before and after, with buffers that serve all plans of the same slack."""
        slack = plan.slack
        # An activation is in use from when its receive is posted to the end of its backward.
        held = plan.max_in_flight(stage) + lead_of_previous(stage, slack)
        previous = following = None
        if stage > 0:
            before = self._ranks[stage - 1]
            outgoing = self._outgoing("PACI_GRADIENTS", before, sends_in_flight(stage - 1, slack))
            previous = Neighbour(before, outgoing, self._incoming("PACI_ACTIVATIONS", before, ring=held))
        if stage < len(self._ranks) - 1:
            after = self._ranks[stage + 1]
            # A gradient, to the end of its backward; and those that are posted ahead.
            gradients = 1 + (lead_of_previous(stage + 1, slack) if plan.gradients_ahead else 0)
            outgoing = self._outgoing("PACI_ACTIVATIONS", after, sends_in_flight(stage, slack))
            following = Neighbour(after, outgoing, self._incoming("PACI_GRADIENTS", after, gradients))
        return previous, following

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorPair | None:
        """See :class:`~.links.Transport`."""
        if self._tied is None:
            return None
        if self._pair is None or self._pair[0] != record_lag:
            self._pair = record_lag, self._make_pair(self._tied, record_lag)
        return self._pair[1]

    def _make_pair(self, like: torch.Tensor, record_lag: int) -> TensorPair:
        first, last = self._ranks[0], self._ranks[-1]
        mine, other = ("FIRST", last) if self._here == first else ("LAST", first)
        theirs = "LAST" if mine == "FIRST" else "FIRST"
        turns = sum(name.startswith("PACI_TIED_FROM_FIRST") for name, _, _ in self._directions)
        ring = -(-record_lag // turns) + 1  # posted, or received and not applied yet
        return TensorPair(
            [self._outgoing(f"PACI_TIED_FROM_{mine}_{turn}", other, hold=ring) for turn in range(turns)],
            [self._incoming(f"PACI_TIED_FROM_{theirs}_{turn}", other, ring, like) for turn in range(turns)],
        )

    def _outgoing(self, name: str, receiver: int, hold: int) -> Outgoing:
        kind = HostOutgoing if self._through_host else DirectOutgoing
        return kind(self._directions[name, self._here, receiver].group, receiver, hold)

    def _incoming(self, name: str, sender: int, ring: int, like: torch.Tensor | None = None) -> Incoming:
        kind = HostIncoming if self._through_host else DirectIncoming
        shape, dtype = (self._shape, self._dtype) if like is None else (tuple(like.shape), like.dtype)
        return kind(self._directions[name, sender, self._here].group, sender, shape, dtype, self._device, ring)

    def rank_of(self, stage_index: int) -> int:
        """See :class:`~.links.Transport`."""
        return self._ranks[stage_index]
