"""The process groups by which stages in several processes reach each other, and the transport made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import sends_in_flight

from .control import Record
from .emulate import WAYS, HandedOver, InProcessExchange, local_neighbour
from .hand_over import HandOver
from .link_times import LinkTimes, measure
from .links import (
    DirectIncoming,
    DirectOutgoing,
    HostIncoming,
    HostOutgoing,
    Incoming,
    Neighbour,
    Outgoing,
    RemoteRecords,
    StageLink,
    TensorPair,
)
from .tied_embeddings import TensorExchange

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
    """A :class:`~.links.Transport` between processes that each hold a stage, or several."""

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

        ``ranks`` are those of this pipeline's stages, first to last; a rank that stands there twice holds two. Activations,
        and their gradients, have ``shape`` and ``dtype`` between all stages, and lie on ``device``. ``over_nccl`` says
        whether a transfer is a kernel on it; ``through_host`` sends over gloo by way of the host's memory. ``tied`` is like
        the gradient that the first and the last stage share, where they share one and this rank has one of them. For
        ``agree`` see :meth:`.links.Transport.agree`.

        Each link between stages of two ranks has a group for activations and one for gradients; two ranks that share an
        embedding have some for each direction.
        """
        self.receives_hold_device = over_nccl
        self.agree = agree
        self._ranks, self._here = list(ranks), dist.get_rank()
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._through_host, self._tied = through_host, tied
        self._ties_here = tied is not None and self._ranks[0] == self._ranks[-1]
        self._make_group = make_group
        self._directions = self._create(record_lag)
        use_once(list(self._directions.values()), self._ranks.index, torch.device("cpu") if through_host else device)
        self._handed_over: HandedOver = defaultdict(HandOver)
        # By stage, with the slack and record lag that they are made for.
        self._neighbours: dict[int, tuple[tuple[int, ...], int, StageLink]] = {}
        self._pair: tuple[int, tuple[TensorExchange, TensorExchange]] | None = None  # and the record lag

    def _chunk(self, stage: int) -> int:
        """Whether an earlier stage is in the same process."""
        return int(self._ranks.index(self._ranks[stage]) < stage)

    def _create(self, record_lag: int) -> dict[tuple[str, int, int], Direction]:
        """All groups of this rank, made together; directions by name, sender and receiver."""
        named: list[tuple[str, int, int]] = []
        for link, (before, after) in enumerate(pairwise(self._ranks)):
            if before != after and self._here in (before, after):
                named += [(self._name("ACTIVATIONS", link), before, after), (self._name("GRADIENTS", link), after, before)]
        if self._tied is not None and not self._ties_here:
            first, last = self._ranks[0], self._ranks[-1]
            # An update's transfer is complete before the one of ``record_lag`` updates later is posted. With fewer turns
            # a GPU with one hardware queue may stand still for a while, but not for ever.
            for turn in range(min(record_lag, MAX_TIED_TURNS)):
                named += [(f"PACI_TIED_FROM_FIRST_{turn}", first, last), (f"PACI_TIED_FROM_LAST_{turn}", last, first)]
        backend = "gloo" if self._through_host else None
        # NCCL names a communicator by its ranks in order, so a group is made of the pair either way round.
        wanted = [Wanted(name, (min(by, to), max(by, to)), backend) for name, by, to in named]
        records = Wanted("PACI_RECORDS", tuple(sorted(set(self._ranks))), "gloo")
        self._records, *groups = create_groups([records, *wanted], self._make_group)
        return {key: Direction(key[0], group, *key[1:]) for key, group in zip(named, groups, strict=True)}

    def _name(self, what: str, link: int) -> str:
        """Of a link's direction; two ranks that are neighbours twice have groups for each time."""
        return f"PACI_{what}" + ("_2" if self._chunk(link) else "")

    def link(self, stage_index: int, plan: Plan) -> StageLink:
        """See :class:`~.links.Transport`. Its buffers serve all plans of the same slack and record lag."""
        made = self._neighbours.get(stage_index)
        if made is None or made[:2] != (plan.slack, plan.record_lag):
            previous = self._neighbour(stage_index, stage_index - 1, plan) if stage_index > 0 else None
            following = self._neighbour(stage_index, stage_index + 1, plan) if stage_index < len(self._ranks) - 1 else None
            made = self._neighbours[stage_index] = plan.slack, plan.record_lag, StageLink(previous, following)
        return made[2]

    def _neighbour(self, here: int, there: int, plan: Plan) -> Neighbour:
        """Stage ``there`` as stage ``here``, next to it, sees it."""
        link, rank = min(here, there), self._ranks[there]
        if rank == self._here:
            return local_neighbour(self._handed_over, here, there)
        (sent, _), (received, _) = WAYS if here < there else reversed(WAYS)
        ring = plan.most_received(here, Kind.RECV_BACKWARD if here < there else Kind.RECV_FORWARD)
        return Neighbour(
            self._outgoing(self._name(sent, link), rank, sends_in_flight(link, plan.slack)),
            self._incoming(self._name(received, link), rank, ring),
            # The other has read report k by the time this one reports k + lag; totals are read sooner.
            RemoteRecords(self._records, rank, tag=self._chunk(here), hold=plan.record_lag + 1),
        )

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorExchange | None:
        """See :class:`~.links.Transport`."""
        ends = (0, len(self._ranks) - 1)
        if self._tied is None or stage_index not in ends:
            return None
        if self._pair is None or self._pair[0] != record_lag:
            if self._ties_here:
                ends_of_pair: tuple[TensorExchange, TensorExchange] = InProcessExchange.pair()
            else:  # this rank has one of them
                pair = self._make_pair(self._tied, record_lag)
                ends_of_pair = pair, pair
            self._pair = record_lag, ends_of_pair
        return self._pair[1][ends.index(stage_index)]

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

    def link_times(self) -> dict[int, LinkTimes]:
        """See :class:`~.links.Transport`. First the links that begin at an even stage, all at once, then the others."""
        device = torch.device("cpu") if self._through_host else self._device
        like, found = torch.zeros(self._shape, dtype=self._dtype, device=device), {}
        for link in sorted(range(len(self._ranks) - 1), key=lambda link: (link % 2, link)):
            before, after = self._ranks[link], self._ranks[link + 1]
            if before != after and self._here in (before, after):
                there = self._directions[self._name("ACTIVATIONS", link), before, after]
                back = self._directions[self._name("GRADIENTS", link), after, before]
                measured = measure(there, back, like)
                if self._here == before:
                    found[link] = measured
        return found
