"""The process groups by which the stages of a distributed pipeline reach each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from paci_megatron.plan.schedules import sends_in_flight
from paci_megatron.runtime.control import Record, Request
from paci_megatron.runtime.links import P2PLink, TensorPair
from paci_megatron.runtime.tied_embeddings import TensorExchange


def create_groups(
    mine: Sequence[int], names: Sequence[str], timeout_minutes: int, backend: str | None = None
) -> list[dist.ProcessGroup]:
    """A group of the ranks ``mine`` for each of ``names``; empty if ``mine`` is.

    Collective over the world: every rank creates everyone's groups, in one order, whichever it is in.
    """
    everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, list(mine))
    groups = []
    for name in names:
        for ranks in sorted({tuple(ranks) for ranks in everyones if ranks}):
            group = dist.new_group(list(ranks), timeout=timedelta(minutes=timeout_minutes), backend=backend, group_desc=name)
            if ranks == tuple(mine):
                groups.append(group)
    return groups


def p2p_links(
    args: argparse.Namespace, config: object, shape: tuple[int, ...], device: torch.device
) -> Callable[[int], P2PLink]:
    """Makes this stage's link, for a plan's record lag. Collective."""
    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    minutes = args.distributed_timeout_minutes
    activations, gradients = create_groups(ranks, ["PACI_ACTIVATIONS", "PACI_GRADIENTS"], minutes)
    (records,) = create_groups(ranks, ["PACI_RECORDS"], minutes, backend="gloo")

    hold = sends_in_flight(len(ranks), args.paci_extra_in_flight)

    def link(record_lag: int) -> P2PLink:
        forward, backward = (P2PCommunicator(pp_group=group, config=config) for group in (activations, gradients))
        return P2PLink(forward, backward, shape, device, records, record_lag, hold)

    return link


def tied_exchange(args: argparse.Namespace, like: torch.Tensor | None) -> Callable[[int], TensorExchange] | None:
    """Makes the exchange of the tied embedding's gradients, of the form of ``like``, for a plan's record lag.

    None on the stages between the first and the last, which have no ``like``. Collective.
    """
    pipeline = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    ends = [pipeline[0], pipeline[-1]] if like is not None else []
    groups = create_groups(ends, ["PACI_TIED_FROM_FIRST", "PACI_TIED_FROM_LAST"], args.distributed_timeout_minutes)
    if like is None:
        return None
    from_first, from_last = groups
    if dist.get_rank() == ends[0]:
        return lambda lag: TensorPair(from_first, from_last, ends[1], like, hold=lag + 1)
    return lambda lag: TensorPair(from_last, from_first, ends[0], like, hold=lag + 1)


def agreement(args: argparse.Namespace) -> Callable[[Record], Record]:
    """Makes the requests in a record those of all ranks of this stage: of all replicas of the pipeline. Collective."""
    stage = dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    if len(stage) == 1:
        return lambda record: record
    (group,) = create_groups(stage, ["PACI_STAGE"], args.distributed_timeout_minutes, backend="gloo")

    def agree(record: Record) -> Record:
        requests = Request(int(record.requests))
        flags = torch.tensor([int(flag in requests) for flag in Request])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        agreed = sum(flag for flag, is_set in zip(Request, flags.tolist(), strict=True) if is_set)
        return record._replace(requests=float(agreed))

    return agree
