"""The transfers between the stages of a distributed pipeline, as Megatron's arguments and groups have them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

from paci_megatron.config import ConfigError, stages_per_process
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.groups import MakeGroup, ProcessTransport, Wanted, create_groups

from .drains import can_exit
from .stage import Stage, transfer_dtype

DEFAULT_CTAS = 4


def make_group(args: argparse.Namespace) -> MakeGroup:
    """Makes groups with Megatron's function, so that ``--distributed-timeout-seconds-after-init`` reaches them; those of
    the world's backend with :func:`nccl_options`.
    """
    options = nccl_options(args)

    def make(wanted: Wanted) -> dist.ProcessGroup:
        return parallel_state.create_group(
            ranks=list(wanted.ranks),
            timeout=timedelta(minutes=args.distributed_timeout_minutes),
            backend=wanted.backend,
            pg_options=options if wanted.backend is None else None,
            group_desc=wanted.name,
        )

    return make


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
    free, and would wait for the neighbour that a pending receive waits for. Two receives of a stage are pending as a rule,
    and a third for a moment. To be called before the model is built. A margin that the user has set stays.
    """
    over_nccl = _over_nccl(args) and args.paci_emulate_stages is None
    if not over_nccl or args.transformer_impl != "transformer_engine" or all(name in os.environ for name in _NORM_MARGINS):
        return None
    pending = 3 * stages_per_process(args)
    margin = str(pending * int(_transfer_settings(args)["max_ctas"]))
    for name in _NORM_MARGINS:
        os.environ.setdefault(name, margin)
    return f"Transformer Engine's norms leave {margin} multiprocessors to transfers ({', '.join(_NORM_MARGINS)})"


def process_transport(
    args: argparse.Namespace, stages: Sequence[Stage], ranks: Sequence[int], record_lag: int
) -> ProcessTransport:
    """The transport of this rank's stages; ``ranks`` are those of all stages. Collective over the world.

    (Megatron's own calls are not used: they pair a send with a
    receive and wait for both, and use the world group for one direction when there are two stages.)
    """
    stage = stages[0]
    config = stage.model_config
    if config.variable_seq_lengths:
        raise ConfigError(
            "variable sequence lengths do not work with --pipeline-schedule paci: transfers have one shape, fixed "
            "before training. Pad the batches to --seq-length."
        )
    (shape,) = get_tensor_shapes(
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        config=config,
        tp_group=stage.groups.tp,
        cp_group=stage.groups.cp,
    )
    tied = (weight for each in stages if (weight := each.tied_weight()) is not None)
    weight = next(tied, None)
    return ProcessTransport(
        ranks,
        shape,
        transfer_dtype(args, config),
        next(stage.model.parameters()).device,
        record_lag,
        over_nccl=_over_nccl(args),
        through_host=args.paci_link == "host",
        tied=weight.main_grad if weight is not None else None,  # type: ignore[attr-defined]  # Megatron's
        make_group=make_group(args),
        agree=agreement(args),
    )


def agreement(args: argparse.Namespace) -> Callable[[Record], Record]:
    """Makes the wish to exit and the loss in a record those of all replicas of the pipeline. Collective."""
    stage = dist.get_process_group_ranks(parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    if len(stage) == 1 or not (can_exit(args) or args.paci_fallback):
        return lambda record: record
    (group,) = create_groups([Wanted("PACI_STAGE", tuple(stage), "gloo")], make_group(args))

    def agree(record: Record) -> Record:
        sums = torch.tensor([record.exits, record.loss], dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        exits, loss = sums.tolist()
        return record._replace(exits=exits, loss=loss / len(stage))

    return agree
