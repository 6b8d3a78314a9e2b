"""The training run of one process: its stage or emulated stages, and where the pipeline drains."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from paci_megatron.config import ConfigError, PaciConfig
from paci_megatron.plan.schedules import max_drift
from paci_megatron.runtime.emulate import run_stages_to_update
from paci_megatron.runtime.links import P2PLink
from paci_megatron.runtime.update import UpdateResult
from paci_megatron.telemetry.meters import StageMeter

from .boundaries import Boundaries
from .stage import Stage


class TrainingContext:
    """One process's run of plans: one stage of a distributed pipeline, or all stages of an emulated one.

    ``iteration`` counts finished iterations. Between :meth:`is_drained` moments micro-batches are in flight, and Megatron
    may not evaluate, save or stop.
    """

    def __init__(self, config: PaciConfig, args: argparse.Namespace, boundaries: Boundaries, stages: list[Stage]) -> None:
        self.config = config
        self.args = args
        self.boundaries = boundaries
        self.stages = stages
        self.iteration: int = args.iteration
        self.last_updates: list[UpdateResult] = []
        for stage in stages:
            keep_gradient_statistics_within_stage(stage.optimizer)

    def is_drained(self) -> bool:
        """Whether the pipeline is empty and all stages have done the same updates."""
        return self.stages[0].is_drained()

    def require_drained(self, purpose: str) -> None:
        """``RuntimeError`` if micro-batches are in flight when Megatron is about to do ``purpose``."""
        if not self.is_drained():
            raise RuntimeError(
                f"{purpose} after iteration {self.iteration} needs an empty pipeline, and none of Megatron's arguments "
                "foretold it. This is a bug in paci-megatron; --paci-drain-interval 1 works around it."
            )

    def run_iteration(self, forward_step_func: Any, data_iterator: Any, num_microbatches: int) -> list[Any]:
        """Perform the plan up to the next update; returns the losses of its window (empty but on the last stage)."""
        if self.is_drained():
            self._begin_plan(num_microbatches)
        for stage in self.stages:
            stage.feed(forward_step_func, self.iterator_of(stage, data_iterator))
        self.last_updates = run_stages_to_update(self.stages)
        self.iteration += 1
        if self.boundaries.is_drain(self.iteration):
            for stage in self.stages:
                stage.end_plan()
        return self.stages[-1].take_losses()

    def iterator_of(self, stage: Stage, data_iterator: Any) -> Any:
        """The iterator that feeds ``stage``: Megatron's, or an emulated stage's own (see emulation.py)."""
        return data_iterator[stage.stage_index] if isinstance(data_iterator, list) else data_iterator

    def _begin_plan(self, a: int) -> None:
        begin = self.iteration

        def is_drain(update: int) -> bool:
            return self.boundaries.is_drain(begin + update)

        for stage in self.stages:
            stage.begin_plan(a, is_drain, self.args)

    def describe(self, a: int) -> list[str]:
        """What this run will do, for the log."""
        num_stages, flushes = self.config.num_stages, self.config.schedule != "paci"
        drift = [0 if flushes else max_drift(s, num_stages, a, self.config.extra_in_flight) for s in range(num_stages)]
        where = " emulated in one process" if self.config.emulates else ""
        return [
            f"schedule {self.config.schedule}: {num_stages} stages{where}, {a} micro-batches per update, drift of at most "
            f"{max(drift)} updates (by stage: {' '.join(map(str, drift))})",
            f"clipping: {'each stage by its own gradient norm' if self.config.clip_mode == 'stage' else 'none'}",
        ]


def distributed_stage(
    config: PaciConfig, args: argparse.Namespace, model: Any, optimizer: Any, scheduler: Any, meter: StageMeter
) -> Stage:
    """This rank's stage of a pipeline over processes. Collective: every rank makes its own together."""
    model_config = get_model_config(model)
    if model_config.variable_seq_lengths:
        raise ConfigError(
            "variable sequence lengths do not work with --pipeline-schedule paci: transfers have one shape, fixed before "
            "training. Pad the batches to --seq-length."
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    (shape,) = get_tensor_shapes(
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        config=model_config,
        tp_group=groups.tp,
        cp_group=groups.cp,
    )
    device = torch.device(next(model.parameters()).device)
    link_groups = _create_link_groups(groups.pp, args.distributed_timeout_minutes)

    def link() -> P2PLink:
        activations, gradients = (P2PCommunicator(pp_group=group, config=model_config) for group in link_groups)
        return P2PLink(activations, gradients, tuple(shape), device)

    return Stage(groups.pp.rank(), config, model, optimizer, scheduler, groups, meter, link)


def _create_link_groups(pipeline: dist.ProcessGroup, timeout_minutes: int) -> list[dist.ProcessGroup]:
    """This pipeline's groups for activations and for gradients. Collective: all ranks create all groups in one
    order."""
    mine = dist.get_process_group_ranks(pipeline)
    everyones: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyones, mine)
    groups = []
    for name in ("PACI_ACTIVATIONS", "PACI_GRADIENTS"):
        for ranks in sorted({tuple(ranks) for ranks in everyones}):
            group = dist.new_group(list(ranks), timeout=timedelta(minutes=timeout_minutes), group_desc=name)
            if list(ranks) == mine:
                groups.append(group)
    return groups


def keep_gradient_statistics_within_stage(optimizer: Any) -> None:
    """Make Megatron's optimizers reduce gradient norms over the ranks that share this stage only.

    By default they reduce over all stages (``megatron.core.optimizer``: model-parallel group, or the world for the
    distributed optimizer), in every step, even without clipping.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        holds_experts = any(group.get("is_expert_parallel") for group in part.param_groups)
        if isinstance(part, DistributedOptimizer):
            part.grad_stats_parallel_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        elif holds_experts:
            part.grad_stats_parallel_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        else:
            part.grad_stats_parallel_group = parallel_state.get_tensor_model_parallel_group()


_current: TrainingContext | None = None


def current() -> TrainingContext | None:
    """The run in progress under paci, or None under any other schedule."""
    return _current


def set_current(context: TrainingContext | None) -> None:
    """Set or forget the run in progress."""
    global _current
    _current = context
