"""The process groups by which the stages of a distributed pipeline reach each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

from paci_megatron.config import ConfigError
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
from paci_megatron.schedule.schedules import sends_in_flight

from .drains import can_exit
from .stage import Stage


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


class ProcessTransport:
    """A :class:`~paci_megatron.runtime.links.Transport` between processes that hold one stage each."""

    def __init__(self, args: argparse.Namespace, stage: Stage) -> None:
        """Makes the process groups. Collective: every rank makes its own together.

        Each pair of neighbouring stages has a group for activations and one for gradients. Megatron's ``P2PCommunicator``
        says who they are. (Its own calls pair a send with a receive and wait for both, and use the world group for one
        direction when there are two stages.)
        """
        config = stage.model_config
        if config.variable_seq_lengths:
            raise ConfigError(
                "variable sequence lengths do not work with --pipeline-schedule paci: transfers have one shape, fixed "
                "before training. Pad the batches to --seq-length."
            )
        self._args = args
        self._dtype = config.pipeline_dtype
        (self._shape,) = get_tensor_shapes(
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            config=config,
            tp_group=stage.groups.tp,
            cp_group=stage.groups.cp,
        )
        self._device = next(stage.model.parameters()).device
        communicator = P2PCommunicator(pp_group=stage.groups.pp, config=config)
        self._here = here = dist.get_rank()
        self._ranks = dist.get_process_group_ranks(stage.groups.pp)
        self._before = None if communicator.is_pp_first_stage else communicator.prev_rank
        self._after = None if communicator.is_pp_last_stage else communicator.next_rank
        down = [(by, to) for by, to in ((self._before, here), (here, self._after)) if by is not None and to is not None]
        self._activations = dict(zip(down, create_directions(down, "PACI_ACTIVATIONS", args, self._device), strict=True))
        up = [(to, by) for by, to in down]
        self._gradients = dict(zip(up, create_directions(up, "PACI_GRADIENTS", args, self._device), strict=True))
        minutes = args.distributed_timeout_minutes
        (self._records,) = create_groups([self._ranks], "PACI_RECORDS", minutes, backend="gloo")
        self._tied_weight = weight = stage.tied_weight()
        first, last = self._ranks[0], self._ranks[-1]
        self._tied = [
            create_directions([pair] if weight is not None else [], name, args, self._device)
            for pair, name in (((first, last), "PACI_TIED_FROM_FIRST"), ((last, first), "PACI_TIED_FROM_LAST"))
        ]
        self.agree = agreement(args)

    def link(self, stage_index: int, record_lag: int) -> P2PLink:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        previous = self._neighbour(self._before, outgoing=self._gradients, incoming=self._activations)
        following = self._neighbour(self._after, outgoing=self._activations, incoming=self._gradients)
        return P2PLink(previous, following, self._records, record_lag)

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorPair | None:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        if self._tied_weight is None:
            return None
        (from_first,), (from_last,) = self._tied
        there, back = (from_first, from_last) if self._here == self._ranks[0] else (from_last, from_first)
        like = self._tied_weight.main_grad  # type: ignore[attr-defined]  # Megatron's
        incoming = _incoming(back, self._args.paci_link, tuple(like.shape), like.dtype, self._device)
        return TensorPair(_outgoing(there, self._args.paci_link, hold=record_lag + 1), incoming)

    def rank_of(self, stage_index: int) -> int:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        return self._ranks[stage_index]

    def _neighbour(
        self, rank: int | None, outgoing: dict[tuple[int, int], Direction], incoming: dict[tuple[int, int], Direction]
    ) -> Neighbour | None:
        if rank is None:
            return None
        hold = sends_in_flight(len(self._ranks), self._args.paci_extra_in_flight)
        return Neighbour(
            rank,
            _outgoing(outgoing[self._here, rank], self._args.paci_link, hold=hold),
            _incoming(incoming[rank, self._here], self._args.paci_link, tuple(self._shape), self._dtype, self._device),
        )


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
