"""The plan as a stage performs it, from an empty pipeline to the next drain."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.qk_clip import clip_qk

from paci_megatron.config import PaciConfig
from paci_megatron.runtime.compute import StageCompute
from paci_megatron.runtime.control import Clipping, Control, Record
from paci_megatron.runtime.executor import Cast, Executor
from paci_megatron.runtime.links import Transport
from paci_megatron.runtime.meters import BoundError
from paci_megatron.runtime.tied_embeddings import TiedEmbedding
from paci_megatron.runtime.update import StageUpdate
from paci_megatron.runtime.weight_drift import WeightDrift
from paci_megatron.runtime.weights import WeightVersions
from paci_megatron.schedule.plan import Plan

from .diagnosis import plan_text, where
from .drains import exit_wanted
from .stage import Stage, transfer_dtype


class RunningPlan:
    """One stage's part in a plan: the executor, and what it works with. Updates count from 1 after iteration ``begin``."""

    def __init__(
        self,
        plan: Plan,
        begin: int,
        stage: Stage,
        config: PaciConfig,
        args: argparse.Namespace,
        transport: Transport,
        loop_optimizer: Any,
        on_total: Callable[[int, Record], None],
    ) -> None:
        """``loop_optimizer`` is what Megatron's loop holds; ``on_total`` is told the sums over all stages, by update."""
        self.plan, self.begin = plan, begin
        self.stage, self.transport = stage, transport
        self._log_interval: int = args.log_interval
        self._weight_policy = config.weight_policy
        self._watches_loss = bool(args.paci_fallback) and stage.is_last
        a, lag = plan.microbatches_per_update, plan.record_lag
        stage.loss_scale.begin_plan(lag)
        self.compute = StageCompute(
            stage.model,
            stage.model_config,
            microbatches_per_update=a,
            in_flight_cap=plan.max_in_flight(stage.stage_index),
            is_last_stage=stage.is_last,
            context_parallel_size=stage.groups.cp.size(),
            loss_scale=stage.loss_scale,
        )
        link = transport.link(stage.stage_index, plan)
        clipping = Clipping(config.clip_mode, args.clip_grad)
        self._control = Control(link, clipping, lag, stage.last_total, stage.loss_scale, transport.agree, on_total)
        update = StageUpdate(
            stage.model,
            stage.optimizer,
            stage.scheduler,
            self._control,
            self._finalize_gradients,
            steps=stage.steps,
            loop_optimizer=loop_optimizer,
            samples_per_update=a * args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size,
            take_num_tokens=self._take_num_tokens if stage.model_config.calculate_per_token_loss else None,
            own_figures=self._own_figures,
            readings=stage.readings,
            tied=_tied(stage, transport, lag),
            after_step=self._after_step,
            look_ahead=stage.look_ahead,
            delay=plan.mean_drift(stage.stage_index),
        )
        weights = WeightVersions(tuple(stage.model.parameters()), config.weight_policy, a)
        self._weight_drift = _weight_drift(plan, stage, config)
        self._changed_backwards: list[int] = []
        stage.meter.begin_plan(plan)
        if stage.trace is not None:
            stage.trace.begin_plan(a, begin)
        actions = plan.actions(stage.stage_index)
        cast = Cast(transfer_dtype(args, stage.model_config), stage.model_config.pipeline_dtype)
        self.executor = Executor(
            actions, self.compute, link, update, weights, stage.meter, stage.trace, self._weight_drift, cast
        )

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The executor runs inside: as its stage, watched if wanted, with errors that say where in the plan they are."""
        stage = self.stage
        try:
            with stage.active(), stage.saved.watched() if stage.saved is not None else contextlib.nullcontext():
                yield
        except BoundError as error:
            raise BoundError(f"{error}. The plan around it:\n{plan_text(self)}") from error
        except Exception as error:
            error.add_note(f"paci-megatron: {where(self)}")
            raise
        if stage.saved is not None:
            stage.meter.saved_activation_bytes = stage.saved.peak_bytes
            most = self.plan.max_in_flight(stage.stage_index)
            if self.executor.state.forwards >= 2 * most:
                stage.meter.bytes_per_microbatch = stage.saved.peak_bytes / most
                stage.saved = None  # the peak has been, and counting costs time

    def finish(self) -> None:
        """End at a drain; ``RuntimeError`` if anything is still in flight or under way."""
        self.executor.finish()
        self.stage.loss_scale.end_plan()
        if self.stage.trace is not None:
            self.stage.trace.end_plan()
        self.stage.last_total = self._control.last_total

    def _after_step(self) -> None:
        model_config = self.stage.model_config
        if model_config.qk_clip or model_config.log_max_attention_logit:
            self.stage.max_attention_logit = clip_qk([self.stage.model], log_max_only=not model_config.qk_clip)
        if self._weight_policy == "latest":
            self.compute.renew_copies()
        else:  # older versions are put in place by copying, which a gather under way would write over
            self.compute.param_gather.complete()

    def _finalize_gradients(self) -> None:
        self.stage.finalize_gradients()
        if self._watches_loss:
            self.stage.readings.copy("loss", self.compute.window_loss())
        if self._weight_drift is not None:
            changes, self._changed_backwards = self._weight_drift.take_window()
            if changes is not None:
                self.stage.readings.copy("weight changes", changes)

    def _own_figures(self, update: int) -> Record:
        """What else this stage tells the others as its window ends, and its figures for the log."""
        meter = self.stage.meter
        if (self.begin + update) % self._log_interval == 0:
            meter.end_interval()
        loss = float(self.stage.readings.read("loss")) if self._watches_loss else 0.0
        changes = self.stage.readings.read("weight changes").tolist() if self._changed_backwards else []
        meter.count_weight_changes(changes, self._changed_backwards)
        return Record(
            exits=float(exit_wanted()),
            loss=loss,
            least_bubble=meter.interval_bubble,
            most_bubble=meter.interval_bubble,
            max_drift=float(meter.max_drift),
            weight_change=meter.window_weight_change,
            host_bound=meter.host_bound_fraction,
        )

    def _take_num_tokens(self) -> torch.Tensor | None:
        """The window's tokens over all replicas of the last stage, which alone knows them, (1,)."""
        if not self.stage.is_last:
            return None
        num_tokens = self.compute.take_num_tokens()
        torch.distributed.all_reduce(num_tokens, group=self.stage.groups.dp_cp)
        return num_tokens


def _tied(stage: Stage, transport: Transport, lag: int) -> TiedEmbedding | None:
    """The stage's part in the tied embedding, if it has one."""
    weight, exchange = stage.tied_weight(), transport.tied_exchange(stage.stage_index, lag)
    if weight is None or exchange is None:
        return None
    return TiedEmbedding(weight, exchange, stage.is_first, lag)


def _weight_drift(plan: Plan, stage: Stage, config: PaciConfig) -> WeightDrift | None:
    """What follows the weights that micro-batches meet; None where a backward meets those of its forward."""
    if config.weight_policy != "latest" or plan.max_drift(stage.stage_index) == 0:
        return None
    return WeightDrift(tuple(stage.model.parameters()))
