"""What the pool's workers run. Results must be small and picklable: tensors go back as NumPy arrays."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import paci_megatron
from paci_megatron.runtime.saved import SavedActivations
from paci_megatron.runtime.weight_drift import WeightDrift

from .evaluation_jobs import (  # noqa: F401 - jobs by name
    adopted_arguments,
    differences_from_training,
    evaluate_checkpoint,
    losses_by_loop,
    losses_token_by_token,
    next_tokens,
    refused_evaluation,
)
from .link_jobs import exchange_by_plan  # noqa: F401 - a job by name


@dataclass
class TrainingResult:
    """One rank's training: the exact loss of each iteration and evaluation (last stage), and the final weights."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)  # the loss scale in the log, by iteration
    norms: list[float | None] = field(default_factory=list)  # of the gradients, in the log, by iteration
    skipped: list[int] = field(default_factory=list)  # 1 for each iteration whose update this rank has skipped
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    stage_weights: list[dict[str, np.ndarray]] = field(default_factory=list)
    peak_saved_bytes: int = 0
    peak_weight_sized_tensors: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    collectives_within_stage: int = 0
    exit_code: int | None = None  # None if training came to its end
    last_iteration: int = 0


def train(
    argv: list[str],
    plugin: bool = True,
    count_collectives: bool = False,
    loop: Callable[..., Any] | None = None,
    measure_memory: bool = False,
    within: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
) -> TrainingResult:
    """Train with ``pretrain_gpt_paci.py``'s parts and these arguments; without ``plugin`` on bare Megatron.

    ``loop`` takes the place of Megatron's ``train``. ``within`` makes a context to train in, with Megatron imported.
    """
    import pretrain_gpt_paci as script
    from paci_megatron.plugin import run as runs

    result = TrainingResult()
    with contextlib.ExitStack() as stack:
        if plugin:
            paci_megatron.install()
            stack.callback(paci_megatron.uninstall)
        else:
            stack.enter_context(_bare_megatron_on_cpu())
        import megatron.training.training as training

        stack.callback(_forget_run)
        stack.enter_context(_argv(argv))
        models = stack.enter_context(_recorded(training, result))
        if loop is not None:
            stack.callback(setattr, training, "train", training.train)
            training.train = loop
        if measure_memory:
            stack.enter_context(_measured_memory(result, training, models))
        if count_collectives:
            stack.enter_context(_counted_collectives(result, training))
        if within is not None:
            stack.enter_context(within())
        try:
            _pretrain(script)
        except SystemExit as exit:  # Megatron's way to stop early
            result.exit_code = int(exit.code or 0)
        run = runs.current()
        assert run is None or run.is_drained()
        result.last_iteration = run.iteration if run is not None else 0
        # An emulated run holds all stages: its results are theirs, in order.
        for model in models:
            weights = {name: parameter.detach().float().numpy().copy() for name, parameter in model.named_parameters()}
            result.stage_weights.append(weights)
        result.weights = result.stage_weights[0]
    # Only if all went well: a rank that failed reports at once.
    dist.barrier()
    return result


def train_by_reference(
    argv: list[str], within: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
) -> TrainingResult:
    """Train the models that Megatron builds for emulated stages with tests/support/reference.py in the place of its loop."""
    reports: list[torch.Tensor] = []  # (summed loss, tokens) of each micro-batch
    result = TrainingResult()

    def loop(forward_step_func: Any, model: Any, *others: Any, **named: Any) -> tuple[int, float]:
        from megatron.core.utils import unwrap_model
        from megatron.training import get_args

        from tests.support import reference

        args, data = get_args(), others[2]
        a = args.global_batch_size // args.micro_batch_size
        stages = [
            _reference_stage(unwrap_model(chunk).train(), optimizer, iterator, a, args.lr, reports)
            for chunk, optimizer, iterator in zip(model, others[0]._optimizers, data, strict=True)
        ]
        numbers, links = [int(number) for number in args.paci_extra_in_flight.split(",")], len(stages) - 1
        if len(numbers) == links:
            more = [sum(numbers[s:]) for s in range(len(stages))]
        else:  # fewer from stage to stage, down to none on the last
            more = [math.floor(numbers[0] * (links - s) / links + 0.5) for s in range(len(stages))]
        reference.train(stages, a, args.train_iters, args.paci_weight_policy, args.clip_grad, more)
        windows = torch.stack(reports).view(args.train_iters, a, 2).sum(dim=1)
        result.losses = (windows[:, 0] / windows[:, 1]).tolist()
        return args.train_iters, 0.0

    result.stage_weights = train(argv, loop=loop, within=within).stage_weights
    return result


def _reference_stage(
    chunk: Any, optimizer: Any, data: Any, a: int, learning_rate: float, reports: list[torch.Tensor]
) -> Any:
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    from tests.support import reference

    def forward(microbatch: int, activation: torch.Tensor | None) -> torch.Tensor:
        batch = next(data) if data is not None else {}
        chunk.set_input_tensor([activation])
        first = chunk.pre_process
        output = chunk(
            batch["tokens"] if first else None,
            batch["position_ids"] if first else None,
            batch.get("attention_mask"),
            labels=batch["labels"] if chunk.post_process else None,
        )
        if not chunk.post_process:
            return output
        mask = batch["loss_mask"].view(-1).float()
        loss = torch.sum(output.view(-1).float() * mask)
        reports.append(torch.stack([loss.detach(), mask.sum()]))
        return loss / mask.sum().to(torch.int) / a

    parameters = list(chunk.parameters())
    weights = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    adam = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    # The order in which Megatron's optimizer sums the squares.
    order = [position[id(p)] for p in optimizer.get_parameters() if not getattr(p, "shared", False)]
    group = parallel_state.get_tensor_model_parallel_group()

    def norm(gradients: list[torch.Tensor]) -> float:
        return float(get_grad_norm_fp32([gradients[index] for index in order], grad_stats_parallel_group=group))

    ends = chunk.pre_process or chunk.post_process
    tied = ends and chunk.share_embeddings_and_output_weights
    shared = position[id(chunk.shared_embedding_or_output_weight())] if tied else None
    return reference.ReferenceStage(forward, parameters, weights, adam, norm, shared)


def _pretrain(script: Any) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    script.datasets_provider.is_distributed = True
    pretrain(
        config,
        script.datasets_provider,
        ModelType.encoder_or_decoder,
        script.forward_step,
        get_embedding_ranks=script.embedding_ranks,
    )


def _forget_run() -> None:
    """Leave the process as before the run, but for the process group."""
    import megatron.training.training as training
    from megatron.core import parallel_state, tensor_parallel

    training.destroy_global_state()
    parallel_state.destroy_model_parallel()
    tensor_parallel.random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    # Each group has threads of its own, which end once nothing holds it: see the pool.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    saved, sys.argv = sys.argv, ["pretrain_gpt_paci.py", *argv]
    yield
    sys.argv = saved


@contextlib.contextmanager
def _recorded(training: Any, result: TrainingResult) -> Iterator[list[Any]]:
    """Record losses as Megatron's loop sees them; yields the list that will hold the model."""
    models: list[Any] = []
    originals = {name: getattr(training, name) for name in ("setup_model_and_optimizer", "training_log", "evaluate")}

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        built = originals["setup_model_and_optimizer"](*args, **kwargs)
        models.extend(built[0])
        return built

    def training_log(loss_dict: Any, *args: Any, **kwargs: Any) -> Any:
        result.losses.extend(float(loss) for loss in loss_dict.values())
        result.scales.append(args[3])
        result.skipped.append(args[5])
        result.norms.append(args[6])
        return originals["training_log"](loss_dict, *args, **kwargs)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        evaluation = originals["evaluate"](*args, **kwargs)
        result.evaluations.extend(float(loss) for loss in evaluation[0].values())
        return evaluation

    training.setup_model_and_optimizer, training.training_log, training.evaluate = (
        setup_model_and_optimizer,
        training_log,
        evaluate,
    )
    yield models
    for name, original in originals.items():
        setattr(training, name, original)


@contextlib.contextmanager
def _bare_megatron_on_cpu() -> Iterator[None]:
    """Megatron without the plugin: only the stand-ins for CUDA, without which it cannot start here."""
    from paci_megatron.platform import cpu

    cpu.activate()
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.tensor_parallel.random as random
    import megatron.training.training as training

    saved = training.initialize_megatron, random._set_cuda_rng_state, dataset_utils.compile_helpers
    warm_up = training.set_jit_fusion_options
    training.initialize_megatron = lambda **kwargs: saved[0](allow_no_cuda=True, **kwargs)
    training.set_jit_fusion_options = lambda **kwargs: None  # what it warms up is off here, and it draws random numbers
    random._set_cuda_rng_state = cpu.set_rng_state
    dataset_utils.compile_helpers = lambda: None
    yield
    training.initialize_megatron, random._set_cuda_rng_state, dataset_utils.compile_helpers = saved
    training.set_jit_fusion_options = warm_up
    cpu.deactivate()


@contextlib.contextmanager
def _measured_memory(result: TrainingResult, training: Any, models: list[Any]) -> Iterator[None]:
    """Measure the peak of what autograd holds for backwards, and of tensors as large as all weights of the stage.

    Tensors are counted after each train_step, which under paci is with micro-batches in flight.
    """
    saved: SavedActivations | None = None

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal saved
        if saved is None:
            saved = SavedActivations(parameter for model in models for parameter in model.parameters())
            stack.enter_context(saved.watched())
        returned = original(*args, **kwargs)
        gc.collect()
        largest = max(parameter.numel() for model in models for parameter in model.parameters())
        storages = {
            tensor.untyped_storage().data_ptr()
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * largest
        }
        result.peak_saved_bytes = saved.peak_bytes
        result.peak_weight_sized_tensors = max(result.peak_weight_sized_tensors, len(storages))
        return returned

    # The samples by which drift is followed would be as large as these small weights.
    sample_size, WeightDrift.__init__.__defaults__ = WeightDrift.__init__.__defaults__, (64,)
    # What earlier runs in this process have left does not count: neither gc.collect nor gc.get_objects sees it.
    gc.collect()
    gc.freeze()
    original, training.train_step = training.train_step, train_step
    with contextlib.ExitStack() as stack:
        yield
    training.train_step = original
    WeightDrift.__init__.__defaults__ = sample_size
    gc.unfreeze()


_COLLECTIVES = (
    "allgather",
    "_allgather_base",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "scatter",
)


@contextlib.contextmanager
def _counted_collectives(result: TrainingResult, training: Any) -> Iterator[None]:
    """Count the collectives on groups of ranks of more than one stage, while no drain permits them.

    Under 1F1B, which has no state in flight between iterations, what counts is every collective from the second
    iteration's train_step to the end of the last one. Counted on the process group class itself, so that no alias
    escapes.
    """
    from megatron.core import parallel_state

    from paci_megatron.plugin import run as runs

    counts: Counter[str] = Counter()
    process_group = dist.ProcessGroup
    originals = {name: getattr(process_group, name) for name in _COLLECTIVES}
    stages: dict[int, int] = {}
    inside_flush_step = False

    def setup(*args: Any, **kwargs: Any) -> Any:
        built = original_setup(*args, **kwargs)
        mine = {dist.get_rank(): parallel_state.get_pipeline_model_parallel_rank()}
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        for other in everyones:
            stages.update(other)
        return built

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside_flush_step
        inside_flush_step = (run := runs.current()) is None or not run.runs_plans
        returned = original_train_step(*args, **kwargs)
        inside_flush_step = False
        return returned

    def forbidden_now() -> bool:
        run = runs.current()
        return inside_flush_step if run is None or not run.runs_plans else not run.is_drained()

    def counting(name: str) -> Any:
        def collective(group: Any, *args: Any, **kwargs: Any) -> Any:
            if forbidden_now():
                spanned = {stages[rank] for rank in dist.get_process_group_ranks(group)}
                if len(spanned) > 1:
                    counts[name] += 1
                else:
                    result.collectives_within_stage += 1
            return originals[name](group, *args, **kwargs)

        return collective

    original_setup, training.setup_model_and_optimizer = training.setup_model_and_optimizer, setup
    original_train_step, training.train_step = training.train_step, train_step
    for name in _COLLECTIVES:
        setattr(process_group, name, counting(name))
    yield
    for name, original in originals.items():
        setattr(process_group, name, original)
    training.setup_model_and_optimizer, training.train_step = original_setup, original_train_step
    result.collectives = dict(counts)
