"""Every place where the plugin reaches into Megatron, in one table."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from paci_megatron.platform import cpu

OLDEST, BEFORE = Version("0.19.2"), Version("0.20")


@dataclass(frozen=True, slots=True)
class PatchPoint:
    """``module``'s ``name`` (dotted inside the module) is replaced by what ``replacement(original)`` returns.

    ``parameters`` are the names the original must take, in order; None where only its name matters.
    """

    module: str
    name: str
    replacement: str
    parameters: str | None
    reason: str
    cpu_only: bool = False  # only where there is no CUDA device
    gpu_only: bool = False  # only where there is one

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_TRAINING = "megatron.training.training"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"
_CHOOSE = "pp_size vp_size schedule_pg_collection"

PATCH_POINTS: tuple[PatchPoint, ...] = (
    PatchPoint(
        "megatron.training.arguments",
        "add_megatron_arguments",
        "parser_with_paci_arguments",
        "parser",
        "adds --pipeline-schedule and the --paci-* options",
    ),
    PatchPoint(
        "megatron.training.arguments",
        "validate_args",
        "arguments_checked",
        "args defaults",
        "refuses what cannot work under paci, before anything is built",
    ),
    PatchPoint(
        _TRAINING,
        "setup_model_and_optimizer",
        "model_set_up",
        "model_type model_provider_func checkpointing_context cfg_container pg_collection",
        "builds the stage's runtime around the model and optimizer",
    ),
    PatchPoint(
        _TRAINING,
        "train_step",
        "train_step_chosen",
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration "
        "pg_collection p2p_communicator",
        "runs the plan up to the stage's next update; Megatron's own agrees with all stages in every step",
    ),
    PatchPoint(_TRAINING, "get_forward_backward_func", "schedule_chosen", _CHOOSE, "returns the paci schedule"),
    PatchPoint(_SCHEDULES, "get_forward_backward_func", "schedule_chosen", _CHOOSE, "returns the paci schedule"),
    PatchPoint(
        "megatron.core.pipeline_parallel",
        "get_forward_backward_func",
        "schedule_chosen",
        _CHOOSE,
        "returns the paci schedule",
    ),
    PatchPoint(
        _TRAINING,
        "reduce_max_stat_across_model_parallel_group",
        "kept_within_stage",
        "stat group",
        "the log line's learning rate is reduced over all stages in every iteration, and is the same on all",
    ),
    PatchPoint(
        _TRAINING,
        "training_log",
        "training_log_recorded",
        "loss_dict total_loss_dict learning_rate iteration loss_scale report_memory_flag skipped_iter grad_norm params_norm "
        "num_zeros_in_grad max_attention_logit pg_collection is_first_iteration seqlen_squared_sum_in_batch "
        "total_real_tokens_in_batch",
        "writes the metrics file beside the log line",
    ),
    PatchPoint(
        _TRAINING,
        "report_theoretical_memory",
        "memory_of_schedule_reported",
        "args num_microbatches verbose",
        "assumes flush's micro-batches in flight, and a process for each stage",
    ),
    PatchPoint(
        _TRAINING,
        "evaluate_and_print_results",
        "evaluation_recorded",
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config verbose "
        "write_to_tensorboard non_loss_data_func pg_collection p2p_communicator",
        "checks that the pipeline is empty and stops the training clock",
    ),
    PatchPoint(
        _TRAINING,
        "evaluate",
        "evaluation_result_recorded",
        "forward_step_func data_iterator model process_non_loss_data_func config verbose non_loss_data_func eval_iters "
        "pg_collection p2p_communicator",
        "writes the evaluation's loss to the metrics file",
    ),
    PatchPoint(
        "megatron.training.checkpointing",
        "check_checkpoint_args",
        "resume_reported",
        "checkpoint_args skip_args",
        "says when a run resumes under another schedule or number of micro-batches than the checkpoint's",
    ),
    PatchPoint(
        _TRAINING,
        "checkpoint_and_decide_exit",
        "exit_decided_when_drained",
        "model optimizer opt_param_scheduler iteration num_floating_point_operations_so_far checkpointing_context "
        "train_data_iterator",
        "asks all ranks in every iteration whether to stop, with --exit-signal-handler or --exit-duration-in-mins",
    ),
    PatchPoint(
        _TRAINING,
        "save_checkpoint_and_time",
        "save_when_drained",
        "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far checkpointing_context "
        "non_persistent_ckpt train_data_iterator",
        "checks that the pipeline is empty and stops the training clock",
    ),
    PatchPoint(
        _TRAINING,
        "maybe_finalize_async_save",
        "async_save_finalized_when_drained",
        "blocking terminate",
        "asks all ranks in every iteration while an asynchronous save is pending",
    ),
    PatchPoint(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        "results_queue_out_of_reach",
        "mp_mode",
        "a process that every save needs dies of the SIGTERM at which the last is made",
    ),
    PatchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        "async_worker_out_of_reach",
        "self async_req",
        "a process that every asynchronous save needs dies of the SIGTERM at which the last is made",
    ),
    PatchPoint(
        _SCHEDULES,
        "forward_step",
        "metered",
        "forward_step_func data_iterator model num_microbatches input_tensor forward_data_store config cp_group_size "
        "collect_non_loss_data checkpoint_activations_microbatch is_first_microbatch current_microbatch vp_stage "
        "is_last_stage",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    PatchPoint(
        _SCHEDULES,
        "backward_step",
        "metered",
        "input_tensor output_tensor output_tensor_grad config",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    PatchPoint(
        "megatron.core.optimizer.optimizer",
        "ChainedOptimizer.step_with_ready_grads",
        "metered",
        "self",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    PatchPoint(
        "megatron.core.rerun_state_machine",
        "RerunStateMachine.validate_result",
        "checked_with_update",
        "self result rejection_func message comparison_func tolerance fatal",
        "looks at every loss and every bucket's gradients at once, and each time the host waits for the device",
    ),
    PatchPoint(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        "norm_on_device",
        None,
        "without Transformer Engine and Apex it reads the norm of each parameter to the host",
        gpu_only=True,
    ),
    PatchPoint(
        _SCHEDULES,
        "P2PCommunicator",
        "communicator_of_link",
        "pp_group config",
        "with --paci-link host Megatron's own transfers go through the host's memory too",
    ),
    PatchPoint(
        "megatron.core.distributed.param_and_grad_buffer",
        "_coalescing_manager",
        "reduced_one_by_one",
        "group device async_ops",
        "with --paci-link host gradients of a GPU are reduced over gloo, which takes one tensor at a time",
        gpu_only=True,
    ),
    PatchPoint(
        "megatron.core.datasets.utils",
        "compile_helpers",
        "compiled_in_the_wheel",
        "",
        "would run a Makefile that the megatron-core wheel does not contain",
    ),
    PatchPoint(
        _TRAINING,
        "initialize_megatron",
        "initialized_without_pipeline",
        "allow_no_cuda skip_mpu_initialization get_embedding_ranks get_position_embedding_ranks store "
        "skip_model_parallel_init seed_pp_group seed_dp_group seed_tp_group seed_ep_group seed_etp_group skip_random_seed",
        "emulated stages share a process; and without CUDA Megatron must be told to start all the same",
    ),
    PatchPoint(
        _TRAINING,
        "build_train_valid_test_data_iterators",
        "data_iterators_by_stage",
        "build_train_valid_test_datasets_provider",
        "emulated stages each read their own data",
    ),
    PatchPoint(
        _TRAINING,
        "dummy_train_step",
        "skipped_by_stage",
        "data_iterator",
        "checks that the pipeline is empty, and reads each emulated stage's data",
    ),
    PatchPoint(
        _TRAINING,
        "is_pp_last_stage",
        "last_stage_is_here",
        "pp_group",
        "the losses of emulated stages are in this process",
    ),
    PatchPoint(
        "megatron.training.checkpointing",
        "generate_state_dict",
        "state_of_all_stages",
        "args model optimizer opt_param_scheduler rng_state iteration optim_sd_kwargs model_sd_kwargs rerun_state",
        "a checkpoint of emulated stages holds them all",
    ),
    PatchPoint(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_state_dict",
        "with_steps_to_load",
        "self model_sharded_state_dict is_loading sharding_type metadata",
        "without Transformer Engine and Apex it cannot load a checkpoint",
    ),
    PatchPoint(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "loaded_with_own_step",
        "self model_param tensors",
        "without Transformer Engine and Apex a loaded optimizer counts each update once for every parameter",
    ),
    PatchPoint(
        "megatron.core.transformer.torch_norm",
        "WrappedTorchNorm.__new__",
        "norm_within_sequence_parallel",
        "cls config hidden_size eps persist_layer_norm zero_centered_gamma normalization",
        "lets --sequence-parallel run without Transformer Engine and Apex, whose norms need a GPU",
        cpu_only=True,
    ),
    PatchPoint(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        "cpu_generator",
        "new_state device graph_safe",
        "dropout draws from the CPU's generator",
        cpu_only=True,
    ),
    PatchPoint(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        "already_on_host",
        "tensor as_numpy record_stream",
        "lets --moe-token-dispatcher-type alltoall run without CUDA",
        cpu_only=True,
    ),
)

logger = logging.getLogger(__name__)

_installed: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Apply the table; see :func:`paci_megatron.install`."""
    if _installed:
        raise RuntimeError("paci-megatron is already installed in this process; call uninstall() first")
    on_cpu = cpu.activate()
    points = [point for point in PATCH_POINTS if not (point.gpu_only if on_cpu else point.cpu_only)]
    try:
        _check_version()
        targets = [_find(point) for point in points]
    except RuntimeError:
        cpu.deactivate()
        raise

    for point, (owner, name, original) in zip(points, targets, strict=True):
        _installed.append((owner, name, original))
        setattr(owner, name, _factory(point)(original))
        if os.environ.get("RANK", "0") == "0":
            logger.info("%s: %s", point, point.reason)


def _factory(point: PatchPoint) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    from paci_megatron.platform import shared_gpu, torch_adam
    from paci_megatron.platform import without_te as capabilities
    from paci_megatron.runtime import readings

    from . import children
    from . import loop_patches as loop_hooks
    from . import setup_patches as hooks

    modules = (cpu,) if point.cpu_only else (hooks, loop_hooks, children, readings, shared_gpu, capabilities, torch_adam)
    (factory,) = (getattr(module, point.replacement) for module in modules if hasattr(module, point.replacement))
    return factory


def uninstall() -> None:
    """Undo :func:`install`; see :func:`paci_megatron.uninstall`."""
    if not _installed:
        raise RuntimeError("paci-megatron is not installed in this process")
    from . import setup_patches as hooks

    while _installed:
        owner, name, original = _installed.pop()
        setattr(owner, name, original)
    hooks.reset()
    cpu.deactivate()


def _check_version() -> None:
    import megatron.core

    version = Version(megatron.core.__version__)
    if not OLDEST <= version < BEFORE:
        raise RuntimeError(
            f"megatron-core {version} is installed; paci-megatron knows {OLDEST} and later, before {BEFORE}. "
            f"Run: pip install 'megatron-core>={OLDEST},<{BEFORE}'"
        )


def _find(point: PatchPoint) -> tuple[Any, str, Callable[..., Any]]:
    """The owner, attribute and value of ``point``; ``RuntimeError`` if it is not there as expected."""
    owner: Any = importlib.import_module(point.module)
    *path, name = point.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    original = getattr(owner, name, None)
    if original is None:
        raise RuntimeError(f"the installed Megatron has no {point}, which paci-megatron replaces ({point.reason})")
    if point.parameters is None:
        return owner, name, original
    found = " ".join(inspect.signature(original).parameters)
    if found != point.parameters:
        raise RuntimeError(
            f"{point} of the installed Megatron takes ({found}), paci-megatron expects ({point.parameters}). "
            f"Install a Megatron between {OLDEST} and {BEFORE}."
        )
    return owner, name, original
