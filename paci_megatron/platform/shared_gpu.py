"""What lets ranks train as processes on one GPU (``--paci-link host``): Megatron itself, over gloo and the host's memory.

NCCL refuses two ranks on a GPU. Gloo takes CUDA tensors in the collectives that pipeline and data parallelism need, and
none in transfers, which therefore go through the host here too: those of Megatron's own schedule, and of evaluations.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator, _p2p_ops

from paci_megatron.config import ConfigError
from paci_megatron.runtime.device import HostCopy, host_buffer

from . import cpu

Function = Callable[..., Any]


def adapt_arguments(args: argparse.Namespace) -> list[str]:
    """Let every rank use the GPU there is; returns a line for the log. ``ConfigError`` for what gloo cannot do there."""
    if args.paci_link != "host" or cpu.is_active():
        return []
    check_host_link_on_gpu(args)
    args.distributed_backend = "gloo"
    args.local_rank %= torch.cuda.device_count()
    return [f"stages share {torch.cuda.device_count()} GPU(s): gloo for all groups, transfers through the host's memory"]


def check_host_link_on_gpu(args: argparse.Namespace) -> None:
    """``ConfigError`` if ``--paci-link host`` on a GPU meets what needs collectives that gloo has for CPU tensors only."""
    for flag, name, allowed in (
        ("--tensor-model-parallel-size", "tensor_model_parallel_size", 1),
        ("--context-parallel-size", "context_parallel_size", 1),
        ("--expert-model-parallel-size", "expert_model_parallel_size", 1),
        ("--use-distributed-optimizer", "use_distributed_optimizer", False),
        ("--use-distributed-optimizer", "use_layer_wise_distributed_optimizer", False),
        ("--overlap-grad-reduce", "overlap_grad_reduce", False),
    ):
        value = getattr(args, name, allowed)
        if value != allowed:
            shown = flag if value is True else f"{flag} {value}"
            raise ConfigError(
                f"--paci-link host with {shown} on a GPU: it needs collectives that gloo has for tensors on a CPU only. "
                f"Remove {flag}, or give each rank a GPU and use --paci-link p2p."
            )


class HostP2PCommunicator(P2PCommunicator):
    """Megatron's communicator, its tensors copied to the host before and from it after."""

    def _communicate(
        self,
        *,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: Any,
        wait_on_reqs: bool = True,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """See ``P2PCommunicator._communicate``; waits for everything."""
        if not wait_on_reqs or self.config.variable_seq_lengths:
            raise RuntimeError(
                "--paci-link host waits for every transfer, of one shape; interleaved schedules and variable sequence "
                "lengths need --paci-link p2p"
            )
        device = torch.device("cpu") if cpu.is_active() else torch.device("cuda", torch.cuda.current_device())

        def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else HostCopy(tensor.detach().contiguous()).wait()

        def buffer(is_wanted: bool) -> torch.Tensor | None:
            return host_buffer(tuple(tensor_shape), self.config.pipeline_dtype, device) if is_wanted else None

        def delivered(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True).requires_grad_()

        from_previous, from_next = buffer(recv_prev), buffer(recv_next)
        requests = _p2p_ops(
            tensor_send_prev=copied(tensor_send_prev),
            tensor_recv_prev=from_previous,
            tensor_send_next=copied(tensor_send_next),
            tensor_recv_next=from_next,
            group=self.pp_group,
            prev_pipeline_rank=self.prev_rank,
            next_pipeline_rank=self.next_rank,
        )
        for request in requests.values():
            request.wait()
        return delivered(from_previous), delivered(from_next), None


def _is_used() -> bool:
    from megatron.training import get_args

    return bool(get_args().paci_link == "host")


def wrap_p2p_communicator(original: Function) -> Function:
    """What stands in the place of ``P2PCommunicator`` where Megatron's schedules make one."""

    def communicator(pp_group: Any, config: Any) -> Any:
        return HostP2PCommunicator(pp_group, config) if _is_used() else original(pp_group, config)

    return communicator


def wrap_coalescing_manager(original: Function) -> Function:
    """Wrap ``_coalescing_manager``: gloo reduces CUDA tensors, but not several in one call."""

    @functools.wraps(original)
    @contextlib.contextmanager
    def _coalescing_manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        if _is_used() and not async_ops:
            yield None
            return
        with original(group, device, async_ops) as manager:
            yield manager

    return _coalescing_manager
