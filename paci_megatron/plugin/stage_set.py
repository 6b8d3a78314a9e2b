"""Several stages in one process, all (``--paci-emulate-stages``) or two of a V: Megatron builds, loads, saves each in turn.

A stage is made as its own process would make it: with its place in the pipeline visible to Megatron, its own seed, its own
model part, optimizer and scheduler, and from then on its own random numbers. So everything, checkpoints included, comes
out as from N processes, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.steps import parts_of
from paci_megatron.schedule import Kind

from .run import Run
from .stage import Stage


class PipelinePlace:
    """A stage's place in the pipeline, in the form of a process group: Megatron asks for ``rank()`` and ``size()``."""

    def __init__(self, stage_index: int, num_stages: int) -> None:
        self._stage_index = stage_index
        self._num_stages = num_stages

    def rank(self) -> int:
        """The stage's index."""
        return self._stage_index

    def size(self) -> int:
        """The number of stages."""
        return self._num_stages


class StageWorld:
    """What a stage's own process would have of its own: its place in the pipeline and its random number generators."""

    def __init__(self, place: PipelinePlace) -> None:
        self.place = place
        self.groups = copy.copy(ProcessGroupCollection.use_mpu_process_groups())
        self.groups.pp = place
        self._generators: _Generators | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, Megatron sees this stage's place and draws this stage's random numbers."""
        outside, place = _Generators(), _place()
        if self._generators is not None:
            self._generators.restore()
        _set_place(self.place.rank(), self.place.size())
        try:
            yield
        finally:
            _set_place(*place)
            self._generators = _Generators()
            outside.restore()


class _Generators:
    """The states of all random number generators that training draws from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._device = torch.cuda.get_rng_state()
        self._tracker = tensor_parallel.get_cuda_rng_tracker().get_states()

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        torch.cuda.set_rng_state(self._device)
        tensor_parallel.get_cuda_rng_tracker().set_states(self._tracker)


def _place() -> tuple[int | None, int | None]:
    """The place that Megatron now sees in place of the process group's: stage index and number of stages."""
    return (
        parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK,
        parallel_state._MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE,
    )


def _set_place(stage_index: int | None, num_stages: int | None) -> None:
    parallel_state.set_pipeline_model_parallel_rank(stage_index)
    parallel_state.set_pipeline_model_parallel_world_size(num_stages)


class StageOptimizers:
    """The optimizers of a process's stages where Megatron's training loop, and the user, expect one."""

    is_stub_optimizer = False

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._optimizers = [stage.optimizer for stage in stages]
        self._by_stage = {stage.stage_index: stage.optimizer for stage in stages}

    @property
    def param_groups(self) -> list[Any]:
        """The parameter groups of all of them, for the logged learning rate."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> Any:
        """Step the optimizer of the stage at work; each stage calls it, as each stage's process would its own."""
        return self._by_stage[parallel_state.get_pipeline_model_parallel_rank()].step()

    def get_loss_scale(self) -> torch.Tensor:
        """The last stage's loss scale, which all share."""
        return self._optimizers[-1].get_loss_scale()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """``loss`` as the last stage's optimizer scales it."""
        return self._optimizers[-1].scale_loss(loss)

    def prepare_model_params_for_param_sync(self) -> None:
        """Megatron is about to gather the weights of all of them."""
        for optimizer in self._optimizers:
            optimizer.prepare_model_params_for_param_sync()


def build_stages(
    run: Run, held: Sequence[int], setup: Callable[..., tuple[Any, Any, Any]], *positional: Any, **named: Any
) -> list[Stage]:
    """Run Megatron's ``setup_model_and_optimizer`` once for each of the stages ``held``, as its own process would.

    Collective where there are more processes, of which each holds as many.
    """
    args = run.args
    sources = {name: getattr(args, name) for name in ("load", "pretrained_checkpoint")}
    vars(args).update(dict.fromkeys(sources))  # loaded when all stages are there: a checkpoint is read as a whole
    num_stages = args.pipeline_model_parallel_size
    stages = [_build_stage(index, num_stages, setup, args, *positional, **named) for index in held]
    if stages[0].ties_embeddings and stages[0].is_first and stages[-1].is_last:
        _tie(stages[0], stages[-1])
    vars(args).update(sources)
    if any(sources.values()):
        run.stages, run.is_loading = stages, True
        for stage in stages:
            with stage.active():
                _load_stage(stage, args, named.get("checkpointing_context"))
        run.is_loading = False
    return stages


def _load_stage(stage: Stage, args: argparse.Namespace, context: Any) -> None:
    """Load a stage's part of the checkpoint, with the arguments of Megatron's ``setup_model_and_optimizer``."""
    from megatron.training import training

    groups = stage.groups
    args.consumed_train_samples = args.consumed_valid_samples = 0  # where Megatron loads a run's progress into
    args.iteration, args.num_floating_point_operations_so_far = training.load_checkpoint(
        [stage.model],
        stage.optimizer,
        stage.scheduler,
        checkpointing_context=context,
        tp_group=groups.tp,
        pp_group=groups.pp,
        dp_group=groups.dp,
        expt_dp_group=groups.expt_dp,
    )


def _tie(first: Stage, last: Stage) -> None:
    """Give the last stage the first one's embedding, as an all-reduce does where they are processes."""
    ours, theirs = (unwrap_model(stage.model).shared_embedding_or_output_weight() for stage in (first, last))
    with torch.no_grad():
        theirs.copy_(ours)
    last.optimizer.reload_model_params()


def _build_stage(
    index: int, num_stages: int, setup: Callable[..., Any], args: argparse.Namespace, *positional: Any, **named: Any
) -> Stage:
    from megatron.training import training
    from megatron.training.initialize import _set_random_seed

    world = StageWorld(PipelinePlace(index, num_stages))
    with world.active():
        _set_random_seed(
            args.seed, args.data_parallel_random_init, args.te_rng_tracker, args.inference_rng_tracker, pp_group=world.place
        )
        # Where fused functions are warmed up, that draws random numbers, after seeding and before the model is built.
        training.set_jit_fusion_options(tp_size=args.tensor_model_parallel_size)
        model, optimizer, scheduler = setup(*positional, **{**named, "pg_collection": world.groups})
    _number_as_own_process(optimizer, world)
    meter = StageMeter(index, num_stages, torch.device(next(model[0].parameters()).device))
    return Stage(index, num_stages, model[0], optimizer, scheduler, world.groups, meter, world.active)


def _number_as_own_process(optimizer: Any, world: StageWorld) -> None:
    """The distributed optimizer names its part of a checkpoint by its rank in a group of all stages' processes."""
    num_processes = parallel_state.get_pipeline_model_parallel_group().size()
    for part in parts_of(optimizer):
        if hasattr(part, "data_parallel_group_idx"):
            holds_experts = any(group.get("is_expert_parallel") for group in part.param_groups)
            group = world.groups.tp_ep_pp if holds_experts else world.groups.mp
            ranks = group.size() // num_processes  # of one stage, which follow each other
            part.data_parallel_group_idx = world.place.rank() * ranks + part.data_parallel_group_idx % ranks


def build_data_iterators(build: Callable[..., Any], stages: list[Stage], provider: Any) -> tuple[Any, Any, Any]:
    """Train, validation and test iterators, each a list by stage, as ``provider`` makes them there."""
    # Megatron builds the indices of data sets on rank 0, and asks it whether there are any. In a V it has middle stages.
    in_the_middle = not stages[0].is_first and parallel_state.get_pipeline_model_parallel_rank() == 0
    by_stage: list[tuple[Any, Any, Any]] = []
    for stage in stages:
        with stage.active():
            if in_the_middle and not by_stage:
                _set_place(0, stage.groups.pp.size())
            by_stage.append(build(provider))
    if in_the_middle and by_stage[-1][0] is None:  # such stages read nothing
        by_stage[0] = by_stage[-1]
    train, valid, test = (list(column) for column in zip(*by_stage, strict=True))
    return train, valid, test


def forward_only(
    run: Run,
    forward_step_func: Any,
    data_iterator: Any,
    num_microbatches: int,
    collect_non_loss_data: bool,
    first_val_step: bool | None,
) -> list[Any]:
    """Evaluate ``num_microbatches`` micro-batches through all stages; returns the last stage's losses, where it is here."""
    losses: list[Any] = []
    links = run.links()
    output: Any = None
    for position, action in run.forward_pass(num_microbatches):
        stage, link, microbatch = run.stages[position], links[position], action.index
        if action.kind is Kind.RECV_FORWARD:
            link.post_receive_forward(microbatch)
        elif action.kind is Kind.SEND_FORWARD:
            link.send_forward(microbatch, output)
        else:
            with stage.active():
                output, _ = schedules.forward_step(
                    forward_step_func,
                    run.iterator_of(stage, data_iterator),
                    stage.model,
                    num_microbatches,
                    link.receive_forward(microbatch),
                    losses,
                    stage.model_config,
                    cp_group_size=stage.groups.cp.size(),
                    collect_non_loss_data=collect_non_loss_data,
                    is_first_microbatch=first_val_step is not False and microbatch == 0,
                    current_microbatch=microbatch,
                    is_last_stage=stage.is_last,
                )
    for link in links:
        link.drain()
    return losses


def generate_state_dict(
    original: Callable[..., dict[str, Any]], stages: list[Stage], args: argparse.Namespace, is_loading: bool, **named: Any
) -> dict[str, Any]:
    """The state of ``stages`` for one checkpoint. Tensors carry their global names, so it is the one N processes write.

    The first of ``stages`` has the usual names, and what is not a tensor is its alone, as with processes; the others'
    state stands under names of their own, which a checkpoint of tensors does not keep. To be saved, a tied embedding is
    there once: Megatron shares the writing out among processes by global names and places.
    """
    from megatron.training.checkpointing import get_rng_state

    merged: dict[str, Any] = {}
    for stage in stages:
        groups = stage.groups
        with stage.active():
            rng_state = get_rng_state(args.ckpt_format, groups.tp, groups.pp, groups.dp_cp, groups.dp)
            model = unwrap_model([stage.model])
            state = original(args, model, stage.optimizer, stage.scheduler, rng_state, **named)
        if merged and not is_loading:
            state = _without_copies(state, merged)
        merged = state if not merged else {**merged, f"stage{stage.stage_index}": state}
    return merged


def _without_copies(state: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """``state`` without the tensors that stand at a place where ``written`` has one, as a tied embedding does."""
    taken = {_place_of(value) for value in nested_values(written)} - {None}
    new, _ = extract_matching_values(state, lambda value: _place_of(value) not in taken)
    return dict(new)


def _place_of(value: Any) -> tuple[str, tuple[int, ...]] | None:
    """Where in a checkpoint ``value`` stands; None if it is no tensor of one."""
    return (value.key, value.global_offset) if isinstance(value, ShardedTensor) else None
