"""The training run of this process: one object, from the set-up of the model to the end."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe import moe_logging
from torch.distributed import get_process_group_ranks

from paci_megatron.config import PaciConfig
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.links import StageLink, Transport
from paci_megatron.runtime.look_ahead import LookAhead
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.saved import SavedActivations
from paci_megatron.runtime.state import UpdateResult
from paci_megatron.runtime.steps import parts_of
from paci_megatron.runtime.turns import Turns, run_to_update
from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.vee import forward_pass

from .drains import Drains, MicrobatchForecast
from .flush_trace import FlushTrace, stage_trace
from .groups import Wanted, create_groups, make_group
from .log import print_last_rank
from .moe_metrics import DrainedMoEMetrics
from .monitor import RunMonitor
from .running_plan import RunningPlan
from .slack_choice import SlackChoices, choice_line
from .stage import Stage
from .watchdog import Watchdog, transfer_timeout_s


class Run:
    """A process's training, of a set of stages: one of a distributed pipeline, two of a V, or all of an emulated one.

    ``stages`` are those whose plans are run here; there are none under Megatron's own schedule, of which only the time is
    measured. ``plans`` has the running plan of each stage; there are none while the pipeline is empty. ``iteration`` counts
    finished iterations. Megatron may evaluate, save or stop only while the pipeline is empty.

    Made when the set-up of the model begins; :meth:`start` makes the rest when the model is there.
    """

    meters: Sequence[StageMeter]
    _run_to_update: Callable[[], list[UpdateResult]]  # of the plans in progress
    drains: Drains
    monitor: RunMonitor

    def __init__(self, args: argparse.Namespace, config: PaciConfig | None) -> None:
        """``config`` is None under Megatron's own schedule."""
        self.args = args
        self.config = config
        self.stages: list[Stage] = []
        self.plans: list[RunningPlan] = []
        self.iteration = 0
        self.since_s = time.monotonic()  # the last time that this process began or ended an iteration
        self.updates: list[UpdateResult] = []  # of each stage in the last iteration
        self.totals: dict[int, Record] = {}  # of all stages, by iteration, which have become known in the last one
        self.flush_trace: FlushTrace | None = None
        self.loss_scale: torch.Tensor | None = None  # on the host, a scalar, where plans are run
        self.is_loading = False  # a checkpoint, into emulated stages one after the other
        self.restored: dict[str, Any] | None = None  # what the loaded checkpoint has of :meth:`args_to_save`
        self.evaluating: tuple[str, int] | None = None  # prefix and iteration of the evaluation in progress
        self._watchdog: Watchdog | None = None
        self._moe_tracker: Any = None
        self._plan_begin = 0  # the iteration after which the latest plan began
        self._last_total = 0  # the iteration of the latest total

    @property
    def slack(self) -> tuple[int, ...]:
        """Of the links in the plan that begins after this iteration; there is none under Megatron's own schedule."""
        return self._slack.after(self.iteration)

    @property
    def runs_plans(self) -> bool:
        """Whether plans are run here, rather than Megatron's own schedule."""
        return bool(self.stages)

    @property
    def holds_several(self) -> bool:
        """Whether this process has several stages of the pipeline."""
        return self.config is not None and self.config.stages_per_process > 1

    def start_measuring(self, meter: StageMeter, model: Any) -> None:
        """Training is about to begin under Megatron's own schedule."""
        self._start_monitor([meter])
        trace = stage_trace(self.args, model, meter.stage_index, meter.num_stages)
        if trace is not None:
            self.flush_trace = FlushTrace(trace, self.drains)

    def start(self, stages: list[Stage], transport: Transport, optimizer: Any) -> None:
        """Training is about to begin with ``stages``; ``optimizer`` is what Megatron's loop, and the user, have as one."""
        args = self.args
        self.stages = stages
        self._transport = transport
        self._optimizer = optimizer
        self.iteration = args.iteration
        if self.holds_several and not self._config.emulates:
            for stage in stages:
                stage.meter.beside = tuple(other.meter for other in stages if other is not stage)
        self._start_monitor([stage.meter for stage in stages])
        keep_gradient_statistics_within_stage([stage.optimizer for stage in stages], args)
        for stage in stages:
            stage.trace = stage_trace(args, stage.model, stage.stage_index, self._config.num_stages)
            if args.paci_metrics_file or self._config.extra.most_bytes is not None:
                stage.saved = SavedActivations(stage.model.parameters())
            if self._config.look_ahead:
                stage.look_ahead = LookAhead(stage.optimizer, stage.model)
        # Megatron's loop logs it in every iteration, and would wait for the device.
        self.loss_scale = torch.tensor(float(optimizer.get_loss_scale()), device="cpu")
        restored = self.restored or {}
        if restored:
            self._restore(restored)
        self._slack = SlackChoices(self._config, self.iteration, restored.get("slack"))
        begin = max(self.iteration, args.paci_start_iteration)
        self.drains.request(self._slack.drains(begin, self._new_plan(get_num_microbatches()).record_lag))
        for after in {self.iteration, *(after for after, _ in self._slack.choices)}:
            self._new_plan(get_num_microbatches(), max(after, self.iteration)).check()
        if args.num_experts is not None:
            self._moe_tracker = moe_logging.get_moe_metrics_tracker()
            moe_logging.set_moe_metrics_tracker(DrainedMoEMetrics(self.drained_iterations))
        self._watchdog = Watchdog(self, transfer_timeout_s(args), torch.distributed.get_rank())
        self._watchdog.start()

    def stop(self) -> None:
        """The run is over, or another begins."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self._moe_tracker is not None:
            moe_logging.set_moe_metrics_tracker(self._moe_tracker)
            self._moe_tracker = None

    def is_drained(self) -> bool:
        """Whether the pipeline is empty and all stages have done the same updates."""
        return not self.plans

    def drained_iterations(self) -> int:
        """How many iterations the plan had that has just come to its end; 0 while one is in progress."""
        return self.iteration - self._plan_begin if self.is_drained() else 0

    def require_drained(self, purpose: str) -> None:
        """``RuntimeError`` if micro-batches are in flight when Megatron is about to do ``purpose``."""
        if not self.is_drained():
            raise RuntimeError(
                f"{purpose} after iteration {self.iteration} needs an empty pipeline, and none of Megatron's arguments "
                "foretold it. This is a bug in paci-megatron; --paci-drain-interval 1 works around it."
            )

    def stage_here(self) -> Stage:
        """The stage that is at work: this process's, or the one whose place Megatron sees."""
        if not self.holds_several:
            return self.stages[0]
        seen = parallel_state.get_pipeline_model_parallel_rank()
        return next(stage for stage in self.stages if stage.stage_index == seen)

    def iterator_of(self, stage: Stage, data_iterator: Any) -> Any:
        """The iterator that feeds ``stage``: Megatron's, or of several stages its own (see stage_set.py)."""
        return data_iterator[self.stages.index(stage)] if self.holds_several else data_iterator

    def links(self) -> list[StageLink]:
        """Of each stage, while the pipeline is empty."""
        plan = self._new_plan(get_num_microbatches())
        return [self._transport.link(stage.stage_index, plan) for stage in self.stages]

    def forward_pass(self, num_microbatches: int) -> Iterator[tuple[int, Action]]:
        """What is done here to pass micro-batches through several stages, forward only: which of them does what."""
        config = self._config
        if config.folded is not None and not config.emulates:
            process, _ = config.folded.place(self.stages[0].stage_index)
            for action in forward_pass(process, config.folded, num_microbatches):
                yield action.chunk, action
            return
        for microbatch in range(num_microbatches):
            for position, stage in enumerate(self.stages):
                if not stage.is_first:
                    yield position, Action(Kind.RECV_FORWARD, microbatch)
                yield position, Action(Kind.FORWARD, microbatch)
                if not stage.is_last:
                    yield position, Action(Kind.SEND_FORWARD, microbatch)

    def run_iteration(self, forward_step_func: Any, data_iterator: Any, num_microbatches: int) -> list[Any]:
        """Perform the plan up to the next update; returns the losses of its window (empty but on the last stage)."""
        self.since_s = time.monotonic()
        if not self.plans:
            self._begin_plans(num_microbatches)
        for running in self.plans:
            running.compute.forward_step_func = forward_step_func
            running.compute.data_iterator = self.iterator_of(running.stage, data_iterator)
        self.totals = {}
        self.updates = self._run_to_update()
        self.iteration += 1
        self.since_s = time.monotonic()
        losses = self.plans[-1].compute.take_losses()
        if self.drains.leaves_flush(self.iteration):
            print_last_rank(f"not flushing from iteration {self.iteration + 1} on")
        if self.drains.is_drain(self.iteration):
            for running in self.plans:
                running.finish()
            ended, self.plans = self.plans[0].plan, []
            self._check_tied_embeddings()
            self._settle_slack(ended)
        scale = self.stages[0].loss_scale
        if scale.is_used:  # that of the next window
            next_scale = scale.of(self.iteration - self.plans[0].begin + 1) if self.plans else scale.latest
            self.loss_scale = torch.tensor(next_scale, device="cpu")
        return losses

    def args_to_save(self, args: argparse.Namespace) -> argparse.Namespace:
        """``args`` with what a checkpoint must have for a resumed run to be one that never stopped; the same on every rank.

        None under Megatron's own schedule, which must not hand on that of a checkpoint it began with.
        """
        state = None
        if self.runs_plans and not self.is_loading:
            state = {
                "last_total": self.stages[0].last_total.to_save(),
                "slack": self._slack.choices,
                **self.drains.to_save(),
            }
        return argparse.Namespace(**{**vars(args), "paci_state": state})

    def _restore(self, state: dict[str, Any]) -> None:
        for stage in self.stages:
            stage.last_total = Record(*state["last_total"])
        self.drains.restore(state)

    @property
    def _config(self) -> PaciConfig:
        assert self.config is not None
        return self.config

    def _start_monitor(self, meters: list[StageMeter]) -> None:
        interval = self.config.drain_interval if self.config is not None else self.args.paci_drain_interval
        self.meters = meters
        self.drains = Drains(self.args, interval, MicrobatchForecast(self.args))
        self.monitor = RunMonitor(self.args, meters, self.drains)

    def _settle_slack(self, ended: Plan) -> None:
        """At a drain, that of the plans to come. Collective where it is to be chosen."""
        found: dict[str, Any] = {}
        if self.iteration >= self.args.train_iters:
            return
        if self._slack.is_due(self.iteration, ended):
            found = self._slack.choose(self.iteration, ended, self.meters, self._transport)
        elif not self._slack.begins_after(self.iteration):
            return
        plan = self._new_plan(ended.microbatches_per_update)
        plan.check()
        self.monitor.tell("slack", self.iteration, choice_line(self.iteration, plan, found), slack=plan.slack, **found)

    def _new_plan(self, microbatches_per_update: int, begin: int | None = None) -> Plan:
        """The plan that begins after iteration ``begin``, this one if None."""
        begin = self.iteration if begin is None else begin
        drains, config = self.drains, self._config
        return Plan(
            config.schedule,
            config.num_stages,
            microbatches_per_update,
            self._slack.after(begin),
            lambda update: drains.is_drain(begin + update),
            gradients_ahead=not self._transport.receives_hold_device,
            folded=None if config.emulates else config.folded,
        )

    def _begin_plans(self, microbatches_per_update: int) -> None:
        plan, begin = self._new_plan(microbatches_per_update), self.iteration
        self._plan_begin = self._last_total = begin

        def on_total(update: int, total: Record) -> None:
            if begin + update <= self._last_total:  # stages in one process hear the same, one after the other
                return
            self._last_total = begin + update
            self.totals[begin + update] = total
            line = self.drains.hear(begin + update, total, known_at=begin + update + plan.record_lag)
            if line is not None:
                self.monitor.tell("fallback", begin + update, line, reason=line)

        self.plans = [
            RunningPlan(plan, begin, stage, self._config, self.args, self._transport, self._optimizer, on_total)
            for stage in self.stages
        ]
        self._run_to_update = partial(run_to_update, self.plans)
        if plan.folded is not None:
            process, _ = plan.folded.place(self.stages[0].stage_index)
            self._run_to_update = Turns(plan.process_actions(process), self.plans).run_to_update

    def _check_tied_embeddings(self) -> None:
        """``RuntimeError`` if the two replicas of a tied embedding are not the same. A collective, for drains."""
        if not self.stages[0].ties_embeddings:
            return
        group = parallel_state.get_pipeline_model_parallel_group()
        gathered: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(gathered, [stage.tied_fingerprint() for stage in self.stages], group=group)
        fingerprints = {fingerprint for stages in gathered for fingerprint in stages} - {None}
        if len(fingerprints) > 1:
            raise RuntimeError(
                f"the tied embedding differs between the first and last stage after iteration {self.iteration}; this is a "
                "bug in paci-megatron, please report it. --untie-embeddings-and-output-weights works around it."
            )


def keep_gradient_statistics_within_stage(optimizers: Sequence[Any], args: argparse.Namespace) -> None:
    """Make Megatron's optimizers reduce gradient norms over the ranks that share their stage only. Collective.

    By default they reduce over all stages (``megatron.core.optimizer``: model-parallel group, all stages of an instance
    of the distributed optimizer, or the world), in every step, even without clipping.
    """
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    shards = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    if (args.num_distributed_optimizer_instances or 1) > 1:  # each instance has all the gradients of the stage
        instance = parallel_state.get_intra_distributed_optimizer_instance_group()
        ranks = set(get_process_group_ranks(shards)) & set(get_process_group_ranks(instance))
        (shards,) = create_groups([Wanted("PACI_INSTANCE", tuple(sorted(ranks)))], make_group(args))
    layer_wise = [
        chain
        for whole in optimizers
        for chain in (whole, *getattr(whole, "chained_optimizers", ()))
        if isinstance(chain, LayerWiseDistributedOptimizer)
    ]
    for chain in layer_wise:  # its own norm is one over the world, whatever group its parts have
        chain.get_grad_norm = MethodType(ChainedOptimizer.get_grad_norm, chain)
    spread = {id(part) for chain in layer_wise for part in parts_of(chain)}
    for part in (part for whole in optimizers for part in parts_of(whole)):
        holds_experts = any(group.get("is_expert_parallel") for group in part.param_groups)
        if isinstance(part, DistributedOptimizer) or id(part) in spread:
            part.grad_stats_parallel_group = shards
        elif holds_experts:
            part.grad_stats_parallel_group = parallel_state.get_expert_tensor_and_model_parallel_group()
        else:
            part.grad_stats_parallel_group = parallel_state.get_tensor_model_parallel_group()


_current: Run | None = None


def current() -> Run | None:
    """The run in progress: None before a model is set up, and where there is nothing to run or to measure."""
    return _current


def set_current(run: Run | None) -> None:
    """``run`` begins, or nothing; the one before it stops."""
    global _current
    if _current is not None:
        _current.stop()
    _current = run
