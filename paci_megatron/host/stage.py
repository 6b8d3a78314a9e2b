"""One stage as the host sees it: its model part, its optimizer, and the executor of the running plan."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Any

from megatron.core.utils import get_model_config

from paci_megatron.config import PaciConfig
from paci_megatron.plan import Action, Kind, one_f_one_b_flush, paci, with_transfers
from paci_megatron.plan.render import render_plans
from paci_megatron.plan.schedules import IsDrain, max_in_flight
from paci_megatron.runtime.compute import StageCompute
from paci_megatron.runtime.executor import Executor
from paci_megatron.runtime.links import StageLink
from paci_megatron.runtime.update import StageUpdate, UpdateResult
from paci_megatron.runtime.weights import WeightVersions
from paci_megatron.telemetry.meters import BoundError, StageMeter


class Stage:
    """A stage of the pipeline in this process. The executor exists from the first micro-batch after a drain to the next."""

    def __init__(
        self,
        stage_index: int,
        config: PaciConfig,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        groups: Any,
        meter: StageMeter,
        link: Callable[[], StageLink],
        active: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """``model`` is Megatron's wrapped chunk, ``groups`` its process groups; ``link`` is called once a plan."""
        self.stage_index = stage_index
        self.model = model
        self.model_config = get_model_config(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.groups = groups
        self.meter = meter
        self.active = active
        self._config = config
        self._link = link
        self._executor: Executor | None = None
        self._compute: StageCompute | None = None
        self._grid: Callable[[], str] = str

    @property
    def is_last(self) -> bool:
        """Whether this is the stage with the loss."""
        return self.stage_index == self._config.num_stages - 1

    def is_drained(self) -> bool:
        """Whether no plan is running."""
        return self._executor is None

    def begin_plan(self, a: int, is_drain: IsDrain, args: argparse.Namespace) -> None:
        """Start a plan of ``a`` micro-batches per update, with an empty pipeline."""
        index, num_stages, extra = self.stage_index, self._config.num_stages, self._config.extra_in_flight
        self.meter.begin_plan(a, extra)
        self._compute = StageCompute(
            self.model,
            self.model_config,
            microbatches_per_update=a,
            in_flight_cap=max_in_flight(index, num_stages, extra),
            is_last_stage=self.is_last,
            context_parallel_size=self.groups.cp.size(),
        )
        plan = self._plan(index, a, is_drain)
        samples = a * args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size
        update = StageUpdate(self.model, self.optimizer, self.scheduler, self._finalize, samples)
        weights = WeightVersions(tuple(self.model.parameters()), self._config.weight_policy, a)
        self._executor = Executor(plan, self._compute, self._link(), update, weights, self.meter)
        self._grid = lambda: render_plans(
            [
                list(takewhile(lambda action: action != Action(Kind.UPDATE, 4), self._plan(stage, a, is_drain)))
                for stage in range(num_stages)
            ]
        )

    def _plan(self, index: int, a: int, is_drain: IsDrain) -> Iterator[Action]:
        """The actions of the stage at ``index``."""
        num_stages, extra = self._config.num_stages, self._config.extra_in_flight
        if self._config.schedule == "paci":
            return with_transfers(paci(index, num_stages, a, is_drain, extra), index, num_stages, a, is_drain)
        return with_transfers(one_f_one_b_flush(index, num_stages, a), index, num_stages, a, lambda update: True)

    def feed(self, forward_step_func: Any, data_iterator: Any) -> None:
        """Set where the next forwards come from."""
        assert self._compute is not None
        self._compute.forward_step_func = forward_step_func
        self._compute.data_iterator = data_iterator

    def run_to_update(self) -> UpdateResult | None:
        """See :meth:`Executor.run_to_update`."""
        assert self._executor is not None
        try:
            return self._executor.run_to_update()
        except BoundError as error:
            raise BoundError(f"{error}. The plan from the last drain on:\n{self._grid()}") from error

    def take_losses(self) -> list[Any]:
        """The loss reports of the window just updated."""
        assert self._compute is not None
        return self._compute.take_losses()

    def end_plan(self) -> None:
        """End the running plan at a drain."""
        assert self._executor is not None
        self._executor.finish()
        self._executor = None

    def _finalize(self) -> None:
        """Complete the window's gradients with Megatron's own function; untied, it stays within the stage."""
        self.model_config.finalize_model_grads_func([self.model], None, pg_collection=self.groups, force_all_reduce=False)
