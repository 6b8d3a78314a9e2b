"""The training run of one process: its stage or emulated stages, and where the pipeline drains."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_tensor_shapes
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config, unwrap_model

from paci_megatron.config import ConfigError, PaciConfig
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.emulate import run_stages_to_update
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.update import UpdateResult
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.schedules import max_drift, max_in_flight

from . import groups as wiring
from .drains import Boundaries
from .fallback import SpikeDetector
from .stage import Stage, Wiring
from .watchdog import Watchdog


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
        self._totals: dict[int, Record] = {}  # of all stages, by iteration; complete some updates later
        self._last_judged = self.iteration
        self._spikes = SpikeDetector()
        for stage in stages:
            keep_gradient_statistics_within_stage(stage.optimizer)
            keep_loss_scale_on_host(stage.optimizer)
            if args.paci_metrics_file:
                stage.measure_saved_activations()
        self.watchdog = Watchdog(stages, args.paci_transfer_timeout, torch.distributed.get_rank())

    def is_drained(self) -> bool:
        """Whether the pipeline is empty and all stages have done the same updates."""
        return self.stages[0].is_drained()

    def stage_here(self) -> Stage:
        """The stage that is at work: this process's, or the emulated one whose place Megatron sees."""
        return self.stages[parallel_state.get_pipeline_model_parallel_rank() if self.config.emulates else 0]

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
        if self.boundaries.leaves_flush(self.iteration):
            _print_last_rank(f"not flushing from iteration {self.iteration + 1} on")
        if self.boundaries.is_drain(self.iteration):
            for stage in self.stages:
                stage.end_plan()
            if not self.args.untie_embeddings_and_output_weights:
                self._check_tied_embeddings()
        return self.stages[-1].take_losses()

    def iterator_of(self, stage: Stage, data_iterator: Any) -> Any:
        """The iterator that feeds ``stage``: Megatron's, or an emulated stage's own (see emulation.py)."""
        return data_iterator[stage.stage_index] if isinstance(data_iterator, list) else data_iterator

    def _begin_plan(self, a: int) -> None:
        begin = self.iteration

        def is_drain(update: int) -> bool:
            return self.boundaries.is_drain(begin + update)

        lag = record_lag(self.config.num_stages, a, self.config.extra_in_flight)

        def on_total(update: int, total: Record) -> None:
            iteration = begin + update
            if iteration <= self._last_judged:  # stages in one process tell the same, one after the other
                return
            self._last_judged = iteration
            self._totals[iteration] = total
            if total.exits:
                self.boundaries.drain_at(iteration + lag + 1)
            if self.args.paci_fallback:
                self._watch(iteration, total, from_iteration=iteration + lag + 1)

        for stage in self.stages:
            stage.begin_plan(a, is_drain, self.args, begin, on_total)

    def state_to_save(self) -> dict[str, Any]:
        """What a checkpoint must have for a resumed run to be one that never stopped; the same on every rank."""
        flushing = self.boundaries.flushing
        return {
            "last_total": self.stages[0].last_total.to_save(),
            "losses": self._spikes.to_save(),
            "flushing": (flushing.start, flushing.stop),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_to_save`."""
        for stage in self.stages:
            stage.last_total = Record(*state["last_total"])
        self._spikes = SpikeDetector(state["losses"])
        self.boundaries.flushing = range(*state["flushing"])

    def take_totals(self) -> dict[int, Record]:
        """The records of all stages together that have become known, by iteration, removed."""
        taken, self._totals = self._totals, {}
        return taken

    def _check_tied_embeddings(self) -> None:
        """``RuntimeError`` if the two replicas of a tied embedding are not the same. A collective, for drains."""
        group = parallel_state.get_pipeline_model_parallel_group()
        gathered: list[Any] = [None] * group.size()
        mine = [stage.tied_fingerprint() for stage in self.stages if stage.holds_tied_embedding]
        torch.distributed.all_gather_object(gathered, mine, group=group)
        fingerprints = [fingerprint for stages in gathered for fingerprint in stages]
        if len(set(fingerprints)) != 1:
            raise RuntimeError(
                f"the tied embedding differs between the first and last stage after iteration {self.iteration}; this is a "
                "bug in paci-megatron, please report it. --untie-embeddings-and-output-weights works around it."
            )

    def _watch(self, iteration: int, total: Record, from_iteration: int) -> None:
        """Fall back to flushing from ``from_iteration`` on if training goes wrong. Every rank decides alike."""
        jumps = self._spikes.is_spike(total.loss)
        if total.is_finite and not jumps:
            return
        reason = "the loss jumps" if total.is_finite else "gradients are not finite"
        if self.boundaries.fall_back_at(from_iteration):
            _print_last_rank(
                f"iteration {iteration}: {reason}; flushing as 1f1b from iteration {from_iteration + 1}, for "
                f"{self.args.paci_fallback} iterations"
            )

    def describe(self, a: int) -> list[str]:
        """What this run will do, for the log."""
        num_stages, extra = self.config.num_stages, self.config.extra_in_flight
        where = " emulated in one process" if self.config.emulates else ""
        clipping = f"clipping: {self._describe_clipping(a)}"
        if self.config.schedule != "paci":
            return [f"schedule {self.config.schedule}: {num_stages} stages{where}, {a} micro-batches per update", clipping]
        drift = [max_drift(s, num_stages, a, extra) for s in range(num_stages)]
        held = [max_in_flight(s, num_stages, extra) for s in range(num_stages)]
        more = f", {held[0]} instead of {num_stages} at the first stage" if extra else ""
        return [
            f"schedule {self.config.schedule}: {num_stages} stages{where}, {a} micro-batches per update, drift of at most "
            f"{drift[0]} updates (by stage: {_row(drift)})",
            f"memory: activations of up to {held[0]} micro-batches in flight (by stage: {_row(held)}){more}; one copy "
            "of the weights",
            clipping,
        ]

    def _describe_clipping(self, a: int) -> str:
        limit = f"to {self.args.clip_grad:g}"
        match self.config.clip_mode:
            case "none":
                return "none"
            case "stage":
                return f"{limit}, by each stage's own gradient norm"
            case _:
                lag = record_lag(self.config.num_stages, a, self.config.extra_in_flight)
                return (
                    f"{limit}, by the global norm of {lag} update{'s' if lag > 1 else ''} ago, what a stage knows of the "
                    "current one, and at a drain the exact global norm"
                )


def _row(values: list[int]) -> str:
    return " ".join(map(str, values))


def _print_last_rank(line: str) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        print(f" paci, {line}", flush=True)


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
    tied = None
    if not args.untie_embeddings_and_output_weights:
        is_end = groups.pp.rank() in (0, groups.pp.size() - 1)
        like = unwrap_model(model).shared_embedding_or_output_weight().main_grad if is_end else None
        tied = wiring.tied_exchange(args, like, device)
    links = Wiring(
        link=wiring.p2p_links(args, model_config, tuple(shape), device),
        agree=wiring.agreement(args),
        exchange=tied,
        rank_of=torch.distributed.get_process_group_ranks(groups.pp).__getitem__,
    )
    return Stage(groups.pp.rank(), config, model, optimizer, scheduler, groups, meter, links)


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


def keep_loss_scale_on_host(optimizer: Any) -> None:
    """Let Megatron's loop read the loss scale, which it logs in every iteration, without waiting for the device.

    It is a constant: paci refuses fp16, the only precision with another.
    """
    scale = optimizer.get_loss_scale()
    on_host = scale.cpu()
    optimizer.scale_loss = lambda loss: scale * loss  # as Megatron's, which would take the one below
    optimizer.get_loss_scale = lambda: on_host


_current: TrainingContext | None = None


def current() -> TrainingContext | None:
    """The run in progress under paci, or None under any other schedule."""
    return _current


def runs_plans() -> bool:
    """Whether plans are run here: under paci, or with emulated stages. Otherwise Megatron runs its own schedule."""
    return _current is not None


def set_current(context: TrainingContext | None) -> None:
    """Set or forget the run in progress."""
    global _current
    if _current is not None:
        _current.watchdog.stop()
    _current = context
