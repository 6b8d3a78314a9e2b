"""What ``--paci-trace-dir`` listens to: stages that run plans here, and Megatron's own schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model

from paci_megatron.config import stages_per_process
from paci_megatron.schedule import Action, Kind
from paci_megatron.telemetry.trace import StageTrace

from .drains import Drains


def stage_trace(args: Any, model: Any, stage_index: int, num_stages: int) -> StageTrace | None:
    """The trace of a stage with this model part. Of the ranks that share a stage the first one writes it."""
    if args.paci_trace_dir is None or parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True).rank():
        return None
    device = next(model.parameters()).device
    run = {"schedule": args.pipeline_schedule, "emulated": stages_per_process(args) > 1}
    trace = StageTrace(args.paci_trace_dir, device, stage_index, num_stages, **run)
    trace.listen_to_layers(unwrap_model(model).decoder.layers)
    return trace


_KINDS = {"forward_step": Kind.FORWARD, "backward_step": Kind.BACKWARD, "step_with_ready_grads": Kind.UPDATE}


class FlushTrace:
    """Traces Megatron's own schedule. Only what a stage computes can be seen; the rest of its time stays a gap."""

    def __init__(self, trace: StageTrace, drains: Drains) -> None:
        self._trace = trace
        self._drains = drains
        self._next: dict[Kind, int] = {}  # as in a plan, since its beginning; empty between two plans
        self._updates_due = 0
        self._in_train_step = False

    @contextlib.contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """A train step happens inside, after ``iteration``."""
        if not self._next:
            self._trace.begin_plan(get_num_microbatches(), iteration)
            self._next = {Kind.FORWARD: 0, Kind.BACKWARD: 0, Kind.UPDATE: 1}
            self._updates_due = 1
        self._in_train_step = True
        try:
            yield
        finally:
            self._in_train_step = False
        if self._next[Kind.UPDATE] == self._updates_due:  # skipped
            with self._trace.performing(Action(Kind.UPDATE, self._updates_due)):
                self._next[Kind.UPDATE] += 1
        self._updates_due += 1
        if self._drains.is_drain(iteration + 1):
            self._trace.end_plan()
            self._next = {}

    def performing(self, function: str) -> AbstractContextManager[None]:
        """A context in which Megatron's function of that name does its part of a training step."""
        if not self._in_train_step:
            return contextlib.nullcontext()
        kind = _KINDS[function]
        index = self._next[kind]
        self._next[kind] += 1
        return self._trace.performing(Action(kind, index))
