"""The process groups by which the stages of a distributed pipeline reach each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from paci_megatron.runtime.control import Record
from paci_megatron.runtime.links import (
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
from paci_megatron.runtime.tied_embeddings import TensorExchange
from paci_megatron.schedule.schedules import sends_in_flight

from .exits import can_exit


@dataclass(frozen=True)
class Direction:
    """A process group of two ranks that carries tensors one way only. This rank is one of the two."""

    group: dist.ProcessGroup
    sender: int
    receiver: int

    @property
    def is_outgoing(self) -> bool:
        """Whether this rank sends."""
        return dist.get_rank() == self.sender


def create_groups(
    mine: Sequence[Sequence[int]], name: str, timeout_minutes: int, backend: str | None = None
) -> list[dist.ProcessGroup]:
    """A process group of the ranks of each of ``mine``.

    Collective over the world: every rank creates everyone's groups, in one order, whichever it is in.
    """
    everyones: list[list[tuple[int, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, [tuple(ranks) for ranks in mine])
    created = {}
    for ranks in sorted({ranks for theirs in everyones for ranks in theirs}):
        timeout = timedelta(minutes=timeout_minutes)
        created[ranks] = dist.new_group(list(ranks), timeout=timeout, backend=backend, group_desc=name)
    return [created[tuple(ranks)] for ranks in mine]


def create_directions(
    pairs: Sequence[tuple[int, int]], name: str, args: argparse.Namespace, device: torch.device
) -> list[Direction]:
    """A direction for each (sender, receiver) of ``pairs`` that this rank is in, used once. Collective.

    Once used, whatever the backend creates at a pair's first transfer exists: NCCL's communicators, unless bound to a device
    at start, and its connections. Created later, in the order in which stages happen to need them, they could wait for
    each other for ever. Here all ranks go by one order, in which no ring of pairs can wait.
    """
    backend = "gloo" if args.paci_link == "host" else None
    # NCCL names a communicator by its ranks in order, so a group is made of the pair either way round.
    groups = create_groups([tuple(sorted(pair)) for pair in pairs], name, args.distributed_timeout_minutes, backend)
    directions = [Direction(group, *pair) for group, pair in zip(groups, pairs, strict=True)]
    carrier = torch.device("cpu") if args.paci_link == "host" else device
    for direction in sorted(directions, key=lambda direction: (direction.sender, direction.receiver)):
        _use_once(direction, carrier)
    return directions


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


def _outgoing(direction: Direction, link: str, hold: int) -> Outgoing:
    kind = HostOutgoing if link == "host" else DirectOutgoing
    return kind(direction.group, direction.receiver, hold)


def _incoming(direction: Direction, link: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Incoming:
    kind = HostIncoming if link == "host" else DirectIncoming
    return kind(direction.group, direction.sender, shape, dtype, device)


def p2p_links(
    args: argparse.Namespace, config: Any, shape: tuple[int, ...], device: torch.device
) -> Callable[[int], P2PLink]:
    """Makes this stage's link, for a plan's record lag. Collective.

    Each pair of neighbouring stages has a group for activations and one for gradients. Megatron's ``P2PCommunicator``
    says who they are. (Its own calls pair a send with a receive and wait for both, and use the world group for one
    direction when there are two stages.)
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    communicator = P2PCommunicator(pp_group=pipeline, config=config)
    here = dist.get_rank()
    before = None if communicator.is_pp_first_stage else communicator.prev_rank
    after = None if communicator.is_pp_last_stage else communicator.next_rank
    down = [(by, to) for by, to in ((before, here), (here, after)) if by is not None and to is not None]
    activations = dict(zip(down, create_directions(down, "PACI_ACTIVATIONS", args, device), strict=True))
    up = [(to, by) for by, to in down]
    gradients = dict(zip(up, create_directions(up, "PACI_GRADIENTS", args, device), strict=True))
    minutes = args.distributed_timeout_minutes
    hold = sends_in_flight(pipeline.size(), args.paci_extra_in_flight)
    (records,) = create_groups([dist.get_process_group_ranks(pipeline)], "PACI_RECORDS", minutes, backend="gloo")

    def neighbour(rank: int | None, outgoing: dict[Any, Direction], incoming: dict[Any, Direction]) -> Neighbour | None:
        if rank is None:
            return None
        return Neighbour(
            rank,
            _outgoing(outgoing[here, rank], args.paci_link, hold=hold),
            _incoming(incoming[rank, here], args.paci_link, shape, config.pipeline_dtype, device),
        )

    def link(record_lag: int) -> P2PLink:
        previous = neighbour(before, outgoing=gradients, incoming=activations)
        following = neighbour(after, outgoing=activations, incoming=gradients)
        return P2PLink(previous, following, records, record_lag)

    return link


def tied_exchange(
    args: argparse.Namespace, like: torch.Tensor | None, device: torch.device
) -> Callable[[int], TensorExchange] | None:
    """Makes the exchange of the tied embedding's gradients, of the form of ``like``, for a plan's record lag.

    None on the stages between the first and the last, which have no ``like``. Collective.
    """
    pipeline = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    first, last = pipeline[0], pipeline[-1]
    from_first, from_last = (
        create_directions([pair] if like is not None else [], name, args, device)
        for pair, name in (((first, last), "PACI_TIED_FROM_FIRST"), ((last, first), "PACI_TIED_FROM_LAST"))
    )
    if like is None:
        return None
    (there,), (back,) = (from_first, from_last) if dist.get_rank() == first else (from_last, from_first)
    shape, dtype = tuple(like.shape), like.dtype

    def exchange(lag: int) -> TensorPair:
        incoming = _incoming(back, args.paci_link, shape, dtype, device)
        return TensorPair(_outgoing(there, args.paci_link, hold=lag + 1), incoming)

    return exchange


def agreement(args: argparse.Namespace) -> Callable[[Record], Record]:
    """Makes the wish to exit and the loss in a record those of all replicas of the pipeline. Collective."""
    stage = dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    if len(stage) == 1 or not (can_exit(args) or args.paci_fallback):
        return lambda record: record
    (group,) = create_groups([stage], "PACI_STAGE", args.distributed_timeout_minutes, backend="gloo")

    def agree(record: Record) -> Record:
        sums = torch.tensor([record.exits, record.loss], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        exits, loss = sums.tolist()
        return record._replace(exits=exits, loss=loss / len(stage))

    return agree
