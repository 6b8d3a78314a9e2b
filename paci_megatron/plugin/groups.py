"""The process groups by which the stages of a distributed pipeline reach each other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

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
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import lead_of_previous, sends_in_flight

from .drains import can_exit
from .stage import Stage


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


def create_groups(wanted: Sequence[Wanted], timeout_minutes: int, options: Any = None) -> list[dist.ProcessGroup]:
    """The process groups that this rank asks for; ``options`` are NCCL's, for those of the world's backend.

    Collective over the world: every rank creates everyone's groups, in one order, whichever it is in. Made by Megatron's
    function, so that ``--distributed-timeout-seconds-after-init`` reaches them.
    """
    everyones: list[list[Wanted]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, list(wanted))
    created = {}
    for one in sorted({one for theirs in everyones for one in theirs}, key=lambda one: (one.name, one.ranks)):
        created[one] = parallel_state.create_group(
            ranks=list(one.ranks),
            timeout=timedelta(minutes=timeout_minutes),
            backend=one.backend,
            pg_options=options if one.backend is None else None,
            group_desc=one.name,
        )
    return [created[one] for one in wanted]


DEFAULT_CTAS = 4
MAX_TIED_TURNS = 8
"""PyTorch takes NCCL's streams from a pool of 32. Two communicators on one stream could wait for each other for ever."""


def nccl_options(args: argparse.Namespace) -> Any:
    """NCCL's options for the groups between stages; None where the transfers do not go over NCCL.

    A pending transfer is a kernel that stays on the device, by default of up to 32 thread blocks: a quarter of an H100 for a
    stage in the middle. So they are few, and their stream has priority, since another stage waits for what it carries. What
    ``--nccl-communicator-config-path`` says of ``pp``, the group that Megatron itself would use, goes before.
    """
    if not _over_nccl(args):
        return None
    return parallel_state.get_nccl_options("pp", {"pp": _transfer_settings(args)})


def _over_nccl(args: argparse.Namespace) -> bool:
    """Whether transfers are kernels on a GPU."""
    return args.distributed_backend == "nccl" and args.paci_link != "host"


def _transfer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """In the form of ``--nccl-communicator-config-path``."""
    configured: dict[str, Any] = {}
    if args.nccl_communicator_config_path is not None:
        import yaml

        with open(args.nccl_communicator_config_path, encoding="utf-8") as file:
            configured = (yaml.safe_load(file) or {}).get("pp") or {}
    if "pp" in (args.high_priority_stream_groups or ()):
        configured["is_high_priority_stream"] = True
    values = {"is_high_priority_stream": True, "min_ctas": 1, "max_ctas": DEFAULT_CTAS, **configured}
    if args.paci_transfer_ctas is not None:
        values |= {"min_ctas": 1, "max_ctas": args.paci_transfer_ctas}
    return {**values, "max_ctas": max(values["min_ctas"], values["max_ctas"])}  # NCCL refuses less


_NORM_MARGINS = ("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")


def leave_room_for_transfers(args: argparse.Namespace) -> str | None:
    """Let Transformer Engine's norms leave the multiprocessors that pending receives hold; returns a line for the log.

    At some hidden sizes, such as 5120, 6144 and 8192, their kernels begin only when all the multiprocessors they ask for are
    free, and would wait for the neighbour that a pending receive waits for. Two receives are pending as a rule, and a third
    for a moment. To be called before the model is built. A margin that the user has set stays.
    """
    over_nccl = _over_nccl(args) and args.paci_emulate_stages is None
    if not over_nccl or args.transformer_impl != "transformer_engine" or all(name in os.environ for name in _NORM_MARGINS):
        return None
    margin = str(3 * int(_transfer_settings(args)["max_ctas"]))
    for name in _NORM_MARGINS:
        os.environ.setdefault(name, margin)
    return f"Transformer Engine's norms leave {margin} multiprocessors to transfers ({', '.join(_NORM_MARGINS)})"


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
    """A :class:`~paci_megatron.runtime.links.Transport` between processes that hold one stage each."""

    def __init__(self, args: argparse.Namespace, stage: Stage, record_lag: int) -> None:
        """Makes the process groups, for plans of about that record lag. Collective over the world.

        Each pair of neighbouring stages has a group for activations and one for gradients; the two that share an embedding
        have some for each direction. Megatron's ``P2PCommunicator``
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
        self.receives_hold_device = _over_nccl(args)
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
        self._here = dist.get_rank()
        self._ranks = dist.get_process_group_ranks(stage.groups.pp)
        self._before = None if communicator.is_pp_first_stage else communicator.prev_rank
        self._after = None if communicator.is_pp_last_stage else communicator.next_rank
        self._tied_weight = stage.tied_weight()
        self._directions = self._create(record_lag)
        carrier = torch.device("cpu") if args.paci_link == "host" else self._device
        use_once(list(self._directions.values()), self._ranks.index, carrier)
        self._neighbours: tuple[tuple[int, ...], tuple[Neighbour | None, Neighbour | None]] | None = None  # and their slack
        self._pair: tuple[int, TensorPair] | None = None  # and the record lag that it is made for
        self.agree = agreement(args)

    def _create(self, record_lag: int) -> dict[tuple[str, int, int], Direction]:
        """All groups of this rank, made together; directions by name, sender and receiver."""
        down = [(self._before, self._here), (self._here, self._after)]
        named = [("PACI_ACTIVATIONS", by, to) for by, to in down] + [("PACI_GRADIENTS", to, by) for by, to in down]
        if self._tied_weight is not None:
            first, last = self._ranks[0], self._ranks[-1]
            # An update's transfer is complete before the one of ``record_lag`` updates later is posted. With fewer turns
            # a GPU with one hardware queue may stand still for a while, but not for ever.
            for turn in range(min(record_lag, MAX_TIED_TURNS)):
                named += [(f"PACI_TIED_FROM_FIRST_{turn}", first, last), (f"PACI_TIED_FROM_LAST_{turn}", last, first)]
        directions = [(name, by, to) for name, by, to in named if by is not None and to is not None]
        backend = "gloo" if self._args.paci_link == "host" else None
        # NCCL names a communicator by its ranks in order, so a group is made of the pair either way round.
        wanted = [Wanted(name, (min(by, to), max(by, to)), backend) for name, by, to in directions]
        records = Wanted("PACI_RECORDS", tuple(self._ranks), "gloo")
        minutes = self._args.distributed_timeout_minutes
        self._records, *groups = create_groups([records, *wanted], minutes, nccl_options(self._args))
        return {key: Direction(key[0], group, *key[1:]) for key, group in zip(directions, groups, strict=True)}

    def link(self, stage_index: int, plan: Plan) -> P2PLink:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        if self._neighbours is None or self._neighbours[0] != plan.slack:
            self._neighbours = plan.slack, self._make_neighbours(stage_index, plan)
        return P2PLink(*self._neighbours[1], self._records, plan.record_lag)

    def _make_neighbours(self, stage: int, plan: Plan) -> tuple[Neighbour | None, Neighbour | None]:
        """The stages before and after, with buffers that serve all plans of the same slack."""
        slack = plan.slack
        # An activation is in use from when its receive is posted to the end of its backward.
        held = plan.max_in_flight(stage) + lead_of_previous(stage, slack)
        previous = following = None
        if self._before is not None:
            outgoing = self._outgoing("PACI_GRADIENTS", self._before, sends_in_flight(stage - 1, slack))
            previous = Neighbour(self._before, outgoing, self._incoming("PACI_ACTIVATIONS", self._before, ring=held))
        if self._after is not None:
            # A gradient, to the end of its backward; and those that are posted ahead.
            gradients = 1 + (lead_of_previous(stage + 1, slack) if plan.gradients_ahead else 0)
            outgoing = self._outgoing("PACI_ACTIVATIONS", self._after, sends_in_flight(stage, slack))
            following = Neighbour(self._after, outgoing, self._incoming("PACI_GRADIENTS", self._after, gradients))
        return previous, following

    def tied_exchange(self, stage_index: int, record_lag: int) -> TensorPair | None:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        if self._tied_weight is None:
            return None
        if self._pair is None or self._pair[0] != record_lag:
            self._pair = record_lag, self._make_pair(self._tied_weight, record_lag)
        return self._pair[1]

    def _make_pair(self, weight: torch.nn.Parameter, record_lag: int) -> TensorPair:
        first, last = self._ranks[0], self._ranks[-1]
        mine, other = ("FIRST", last) if self._here == first else ("LAST", first)
        theirs = "LAST" if mine == "FIRST" else "FIRST"
        turns = sum(name.startswith("PACI_TIED_FROM_FIRST") for name, _, _ in self._directions)
        like = weight.main_grad  # type: ignore[attr-defined]  # Megatron's
        ring = -(-record_lag // turns) + 1  # posted, or received and not applied yet
        return TensorPair(
            [self._outgoing(f"PACI_TIED_FROM_{mine}_{turn}", other, hold=ring) for turn in range(turns)],
            [self._incoming(f"PACI_TIED_FROM_{theirs}_{turn}", other, ring, like) for turn in range(turns)],
        )

    def _outgoing(self, name: str, receiver: int, hold: int) -> Outgoing:
        kind = HostOutgoing if self._args.paci_link == "host" else DirectOutgoing
        return kind(self._directions[name, self._here, receiver].group, receiver, hold)

    def _incoming(self, name: str, sender: int, ring: int, like: torch.Tensor | None = None) -> Incoming:
        kind = HostIncoming if self._args.paci_link == "host" else DirectIncoming
        shape, dtype = (tuple(self._shape), self._dtype) if like is None else (tuple(like.shape), like.dtype)
        return kind(self._directions[name, sender, self._here].group, sender, shape, dtype, self._device, ring)

    def rank_of(self, stage_index: int) -> int:
        """See :class:`~paci_megatron.runtime.links.Transport`."""
        return self._ranks[stage_index]


def agreement(args: argparse.Namespace) -> Callable[[Record], Record]:
    """Makes the wish to exit and the loss in a record those of all replicas of the pipeline. Collective."""
    stage = dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    if len(stage) == 1 or not (can_exit(args) or args.paci_fallback):
        return lambda record: record
    (group,) = create_groups([Wanted("PACI_STAGE", tuple(stage), "gloo")], args.distributed_timeout_minutes)

    def agree(record: Record) -> Record:
        sums = torch.tensor([record.exits, record.loss], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        exits, loss = sums.tolist()
        return record._replace(exits=exits, loss=loss / len(stage))

    return agree
