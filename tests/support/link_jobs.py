"""Jobs on the transfers between stages, without a training: also run on GPUs, over NCCL."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import paci_megatron
from paci_megatron.runtime.links import StageLink
from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.schedules import even_slack

EXTRA = 2  # more in flight on the first stage
UPDATES, A = 4, 3
LAG = 2
SHAPE = (4, 2, 8)
TIED_SHAPE = (1024, 1024)  # large enough to be still under way when the other side is done


@dataclass
class LinkResult:
    """What one rank saw: the groups it made, in order, what used each, and whether every tensor was the right one."""

    created: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    uses: set[tuple[str, tuple[int, ...], str]] = field(default_factory=set)  # group, its ranks, "send" or "receive"
    received: int = 0
    addresses: dict[str, list[int]] = field(default_factory=dict)  # of what was received, by the action it was for
    wrong: list[str] = field(default_factory=list)


def exchange_by_plan(link: str, device: str = "cpu") -> LinkResult:
    """Set up a pipeline of all ranks and send, by a stage's plan, tensors that say who sent them."""
    result = LinkResult()
    paci_megatron.install()
    try:
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(1, dist.get_world_size())
        with _recorded(result):
            _exchange(result, link, torch.device(device))
        parallel_state.destroy_model_parallel()
    finally:
        paci_megatron.uninstall()
    dist.barrier()
    return result


def _exchange(result: LinkResult, link: str, device: torch.device) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from paci_megatron.plugin.groups import process_transport

    args = argparse.Namespace(
        paci_link=link,
        distributed_timeout_minutes=2,
        seq_length=SHAPE[0],
        micro_batch_size=SHAPE[1],
        decoder_seq_length=None,
        distributed_backend="gloo",
        exit_signal_handler=False,
        exit_duration_in_mins=None,
        paci_fallback=0,
        paci_transfer_dtype="model",
    )
    stage_index, weight = dist.get_rank(), torch.nn.Parameter(torch.empty(TIED_SHAPE, device=device))
    weight.main_grad = weight.detach()  # type: ignore[attr-defined]  # as Megatron does
    stage = SimpleNamespace(
        model=torch.nn.Linear(1, 1, device=device),
        model_config=SimpleNamespace(
            pipeline_dtype=torch.bfloat16,
            virtual_pipeline_model_parallel_size=None,
            variable_seq_lengths=False,
            hidden_size=SHAPE[2],
            sequence_parallel=False,
        ),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tied_weight=lambda: weight if stage_index in (0, dist.get_world_size() - 1) else None,
    )
    ranks = dist.get_process_group_ranks(stage.groups.pp)
    transport = process_transport(args, [stage], ranks, LAG)  # type: ignore[list-item]  # what it needs of a stage
    for _ in range(2):  # a plan, and the next after its drain
        n, ahead = dist.get_world_size(), not transport.receives_hold_device
        plan = Plan("paci", n, A, even_slack(n, EXTRA), lambda update: update == UPDATES, ahead)
        stage_link = transport.link(stage_index, plan)
        _run_plan(result, stage_link, device, plan)
        stage_link.drain()
    pair = transport.tied_exchange(stage_index, 1)
    if pair is not None:
        for value in range(3):
            pair.send(torch.full(TIED_SHAPE, float(value), device=device))
        for value in range(3):
            _compare(result, f"tied {value}", pair.receive(), value)
        pair.drain()


def _run_plan(result: LinkResult, link: StageLink, device: torch.device, plan: Plan) -> None:
    """The transfers of this stage's plan, up to a drain. Each tensor is the micro-batch's number, gradients negative."""

    for action in plan.actions(dist.get_rank()):
        value = torch.full(SHAPE, float(action.index), dtype=torch.bfloat16, device=device)
        match action.kind:
            case Kind.RECV_FORWARD:
                link.post_receive_forward(action.index)
            case Kind.FORWARD:
                _compare(result, str(action), link.receive_forward(action.index), action.index)
            case Kind.SEND_FORWARD:
                link.send_forward(action.index, value)
            case Kind.RECV_BACKWARD:
                link.post_receive_backward(action.index)
            case Kind.BACKWARD:
                _compare(result, str(action), link.receive_backward(action.index), -action.index)
            case Kind.SEND_BACKWARD:
                link.send_backward(action.index, -value)
            case Kind.UPDATE if action.index == UPDATES:
                return


def _compare(result: LinkResult, what: str, tensor: torch.Tensor | None, value: int) -> None:
    if tensor is None:
        return
    result.received += 1
    result.addresses.setdefault(what[0], []).append(tensor.data_ptr())
    if not torch.equal(tensor.detach().cpu().float(), torch.full(tensor.shape, float(value))):
        result.wrong.append(f"{what}: {tensor.flatten()[0]} for {value}")


@contextlib.contextmanager
def _recorded(result: LinkResult) -> Iterator[None]:
    """Note every group that is made, and every transfer by group."""
    originals = dist.new_group, dist.isend, dist.irecv
    names: dict[Any, str] = {}

    def new_group(ranks: list[int], *args: Any, **named: Any) -> Any:
        result.created.append((named["group_desc"], tuple(ranks)))
        group = originals[0](ranks, *args, **named)
        names[group] = named["group_desc"]
        return group

    def isend(tensor: torch.Tensor, dst: int, group: Any, tag: int = 0) -> Any:
        result.uses.add((names[group], tuple(dist.get_process_group_ranks(group)), "send"))
        return originals[1](tensor, dst=dst, group=group, tag=tag)

    def irecv(tensor: torch.Tensor, src: int, group: Any) -> Any:
        result.uses.add((names[group], tuple(dist.get_process_group_ranks(group)), "receive"))
        return originals[2](tensor, src=src, group=group)

    for name, replacement in (("new_group", new_group), ("isend", isend), ("irecv", irecv)):
        setattr(dist, name, replacement)
    yield
    dist.new_group, dist.isend, dist.irecv = originals
