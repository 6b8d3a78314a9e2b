"""Every place where the plugin reaches into Megatron, in one table.

Importing it imports Megatron: on a machine without CUDA the stand-ins (platform/cpu.py) must be in place before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paci_megatron.platform import cpu, shared_gpu, torch_adam, without_te

from . import children, loop_patches, resume, setup_patches


@dataclass(frozen=True, slots=True)
class PatchPoint:
    """``module``'s ``name`` (dotted inside the module) is replaced by what ``wrap`` makes of it.

    ``parameters`` are the names the original must take, in order; None where only its name matters.
    """

    module: str
    name: str
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
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
        setup_patches.wrap_add_megatron_arguments,
        "parser",
        "adds --pipeline-schedule and the --paci-* options",
    ),
    PatchPoint(
        "megatron.training.arguments",
        "validate_args",
        setup_patches.wrap_validate_args,
        "args defaults",
        "refuses what cannot work under paci, before anything is built",
    ),
    PatchPoint(
        _TRAINING,
        "setup_model_and_optimizer",
        setup_patches.wrap_setup_model_and_optimizer,
        "model_type model_provider_func checkpointing_context cfg_container pg_collection",
        "builds the stage's runtime around the model and optimizer",
    ),
    PatchPoint(
        _TRAINING,
        "train_step",
        loop_patches.wrap_train_step,
        "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration "
        "pg_collection p2p_communicator",
        "runs the plan up to the stage's next update; Megatron's own agrees with all stages in every step",
    ),
    PatchPoint(
        _TRAINING,
        "get_forward_backward_func",
        setup_patches.wrap_get_forward_backward_func,
        _CHOOSE,
        "returns the paci schedule",
    ),
    PatchPoint(
        _SCHEDULES,
        "get_forward_backward_func",
        setup_patches.wrap_get_forward_backward_func,
        _CHOOSE,
        "returns the paci schedule",
    ),
    PatchPoint(
        "megatron.core.pipeline_parallel",
        "get_forward_backward_func",
        setup_patches.wrap_get_forward_backward_func,
        _CHOOSE,
        "returns the paci schedule",
    ),
    PatchPoint(
        _TRAINING,
        "reduce_max_stat_across_model_parallel_group",
        loop_patches.wrap_reduce_max_stat_across_model_parallel_group,
        "stat group",
        "the log line's learning rate is reduced over all stages in every iteration, and is the same on all",
    ),
    PatchPoint(
        _TRAINING,
        "consume_seqlen_stats_in_iteration",
        loop_patches.wrap_consume_seqlen_stats_in_iteration,
        "",
        "sums the lengths of packed sequences over all ranks in every iteration",
    ),
    PatchPoint(
        "megatron.core.transformer.experimental_attention_variant.dsa",
        "DSAIndexerLossLoggingHelper.track_indexer_metrics",
        loop_patches.wrap_track_indexer_metrics,
        "loss_scale iteration writer wandb_writer total_loss_dict per_layer_logging",
        "sums the loss of the sparse attention's indexers over all stages in every iteration",
    ),
    PatchPoint(
        _TRAINING,
        "training_log",
        loop_patches.wrap_training_log,
        "loss_dict total_loss_dict learning_rate iteration loss_scale report_memory_flag skipped_iter grad_norm params_norm "
        "num_zeros_in_grad max_attention_logit pg_collection is_first_iteration seqlen_squared_sum_in_batch "
        "total_real_tokens_in_batch",
        "writes the metrics file beside the log line",
    ),
    PatchPoint(
        _TRAINING,
        "report_theoretical_memory",
        loop_patches.wrap_report_theoretical_memory,
        "args num_microbatches verbose",
        "assumes flush's micro-batches in flight, and a process for each stage",
    ),
    PatchPoint(
        _TRAINING,
        "evaluate_and_print_results",
        loop_patches.wrap_evaluate_and_print_results,
        "prefix forward_step_func data_iterator model iteration process_non_loss_data_func config verbose "
        "write_to_tensorboard non_loss_data_func pg_collection p2p_communicator",
        "checks that the pipeline is empty and stops the training clock",
    ),
    PatchPoint(
        _TRAINING,
        "evaluate",
        loop_patches.wrap_evaluate,
        "forward_step_func data_iterator model process_non_loss_data_func config verbose non_loss_data_func eval_iters "
        "pg_collection p2p_communicator",
        "writes the evaluation's loss to the metrics file",
    ),
    PatchPoint(
        "megatron.training.checkpointing",
        "check_checkpoint_args",
        setup_patches.wrap_check_checkpoint_args,
        "checkpoint_args skip_args",
        "says when a run resumes under another schedule or number of micro-batches than the checkpoint's",
    ),
    PatchPoint(
        _TRAINING,
        "load_checkpoint",
        resume.wrap_load_checkpoint,
        "ddp_model optimizer opt_param_scheduler load_arg strict checkpointing_context skip_load_to_model_and_opt tp_group "
        "pp_group dp_cp_group dp_group expt_dp_group rng_state_key_prefix",
        "ends with status 0 where it finds nothing that it can load",
    ),
    PatchPoint(
        "megatron.core.optimizer_param_scheduler",
        "OptimizerParamScheduler._check_and_set",
        resume.wrap_check_and_set,
        "self cls_value sd_value name",
        "refuses another batch size on resume without the remedy",
    ),
    PatchPoint(
        _TRAINING,
        "checkpoint_and_decide_exit",
        loop_patches.wrap_checkpoint_and_decide_exit,
        "model optimizer opt_param_scheduler iteration num_floating_point_operations_so_far checkpointing_context "
        "train_data_iterator",
        "asks all ranks in every iteration whether to stop, with --exit-signal-handler or --exit-duration-in-mins",
    ),
    PatchPoint(
        _TRAINING,
        "save_checkpoint_and_time",
        loop_patches.wrap_save_checkpoint_and_time,
        "iteration model optimizer opt_param_scheduler num_floating_point_operations_so_far checkpointing_context "
        "non_persistent_ckpt train_data_iterator",
        "checks that the pipeline is empty and stops the training clock",
    ),
    PatchPoint(
        _TRAINING,
        "maybe_finalize_async_save",
        loop_patches.wrap_maybe_finalize_async_save,
        "blocking terminate",
        "asks all ranks in every iteration while an asynchronous save is pending",
    ),
    PatchPoint(
        "megatron.core.dist_checkpointing.strategies.filesystem_async",
        "get_write_results_queue",
        children.wrap_get_write_results_queue,
        "mp_mode",
        "a process that every save needs dies of the SIGTERM at which the last is made",
    ),
    PatchPoint(
        "megatron.core.dist_checkpointing.strategies.async_utils",
        "PersistentAsyncCaller.schedule_async_call",
        children.wrap_schedule_async_call,
        "self async_req",
        "a process that every asynchronous save needs dies of the SIGTERM at which the last is made",
    ),
    PatchPoint(
        _SCHEDULES,
        "forward_step",
        loop_patches.wrap_computing,
        "forward_step_func data_iterator model num_microbatches input_tensor forward_data_store config cp_group_size "
        "collect_non_loss_data checkpoint_activations_microbatch is_first_microbatch current_microbatch vp_stage "
        "is_last_stage",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    PatchPoint(
        _SCHEDULES,
        "backward_step",
        loop_patches.wrap_computing,
        "input_tensor output_tensor output_tensor_grad config",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    *(
        PatchPoint(
            "megatron.core.optimizer.optimizer",
            f"{optimizer}.step",
            loop_patches.wrap_optimizer_step,
            "self",
            "where plans are run its gradients are ready and clipped; called, so that a user's wrapper around it is too",
        )
        for optimizer in ("ChainedOptimizer", "MixedPrecisionOptimizer", "FP32Optimizer")
    ),
    *(
        PatchPoint(
            "megatron.core.optimizer.optimizer",
            f"{optimizer}.get_loss_scale",
            loop_patches.wrap_get_loss_scale,
            "self",
            "Megatron's loop waits for the device to read it, in every iteration",
        )
        for optimizer in ("ChainedOptimizer", "MixedPrecisionOptimizer", "FP32Optimizer")
    ),
    PatchPoint(
        "megatron.core.optimizer.optimizer",
        "ChainedOptimizer.step_with_ready_grads",
        loop_patches.wrap_computing,
        "self",
        "measures the bubble of Megatron's own schedule, if a metrics file is written",
    ),
    PatchPoint(
        "megatron.core.rerun_state_machine",
        "RerunStateMachine.validate_result",
        loop_patches.wrap_validate_result,
        "self result rejection_func message comparison_func tolerance fatal",
        "looks at every loss and every bucket's gradients at once, and each time the host waits for the device",
    ),
    PatchPoint(
        "megatron.core.optimizer.clip_grads",
        "l2_norm_impl",
        loop_patches.wrap_l2_norm_impl,
        None,
        "without Transformer Engine and Apex it reads the norm of each parameter to the host",
        gpu_only=True,
    ),
    PatchPoint(
        _SCHEDULES,
        "P2PCommunicator",
        shared_gpu.wrap_p2p_communicator,
        "pp_group config",
        "with --paci-link host Megatron's own transfers go through the host's memory too",
    ),
    PatchPoint(
        "megatron.core.distributed.param_and_grad_buffer",
        "_coalescing_manager",
        shared_gpu.wrap_coalescing_manager,
        "group device async_ops",
        "with --paci-link host gradients of a GPU are reduced over gloo, which takes one tensor at a time",
        gpu_only=True,
    ),
    PatchPoint(
        "megatron.core.datasets.utils",
        "compile_helpers",
        setup_patches.wrap_compile_helpers,
        "",
        "would run a Makefile that the megatron-core wheel does not contain",
    ),
    PatchPoint(
        _TRAINING,
        "initialize_megatron",
        setup_patches.wrap_initialize_megatron,
        "allow_no_cuda skip_mpu_initialization get_embedding_ranks get_position_embedding_ranks store "
        "skip_model_parallel_init seed_pp_group seed_dp_group seed_tp_group seed_ep_group seed_etp_group skip_random_seed",
        "waits in silence for a missing rank; emulated stages share a process; without CUDA it must be told to start",
    ),
    PatchPoint(
        _TRAINING,
        "build_train_valid_test_data_iterators",
        setup_patches.wrap_build_train_valid_test_data_iterators,
        "build_train_valid_test_datasets_provider",
        "emulated stages each read their own data",
    ),
    PatchPoint(
        _TRAINING,
        "dummy_train_step",
        loop_patches.wrap_dummy_train_step,
        "data_iterator",
        "checks that the pipeline is empty, and reads each emulated stage's data",
    ),
    PatchPoint(
        _TRAINING,
        "is_pp_last_stage",
        setup_patches.wrap_is_pp_last_stage,
        "pp_group",
        "the losses of emulated stages are in this process",
    ),
    PatchPoint(
        "megatron.training.checkpointing",
        "generate_state_dict",
        setup_patches.wrap_generate_state_dict,
        "args model optimizer opt_param_scheduler rng_state iteration optim_sd_kwargs model_sd_kwargs rerun_state",
        "a checkpoint of emulated stages holds them all",
    ),
    PatchPoint(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer.sharded_state_dict",
        torch_adam.wrap_sharded_state_dict,
        "self model_sharded_state_dict is_loading sharding_type metadata",
        "without Transformer Engine and Apex it cannot load a checkpoint",
    ),
    PatchPoint(
        "megatron.core.optimizer.distrib_optimizer",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        torch_adam.wrap_set_main_param_and_optimizer_states,
        "self model_param tensors",
        "without Transformer Engine and Apex a loaded optimizer counts each update once for every parameter",
    ),
    *(
        PatchPoint(
            "megatron.core.tensor_parallel.layers",
            f"{layer}.__init__",
            without_te.wrap_parallel_linear_init,
            None,
            "with Transformer Engine and without Apex it refuses gradient accumulation fusion, Megatron's default",
        )
        for layer in ("ColumnParallelLinear", "RowParallelLinear")
    ),
    PatchPoint(
        "megatron.core.transformer.torch_norm",
        "WrappedTorchNorm.__new__",
        without_te.wrap_torch_norm,
        "cls config hidden_size eps persist_layer_norm zero_centered_gamma normalization",
        "lets --sequence-parallel run without Transformer Engine and Apex",
    ),
    PatchPoint(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        cpu.wrap_set_cuda_rng_state,
        "new_state device graph_safe",
        "dropout draws from the CPU's generator",
        cpu_only=True,
    ),
    PatchPoint(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        cpu.wrap_maybe_move_tensor_to_cpu,
        "tensor as_numpy record_stream",
        "lets --moe-token-dispatcher-type alltoall run without CUDA",
        cpu_only=True,
    ),
    PatchPoint(
        _TRAINING,
        "set_jit_fusion_options",
        cpu.wrap_set_jit_fusion_options,
        "tp_size",
        "would compile fused functions that are off without CUDA, for ten seconds and more",
        cpu_only=True,
    ),
    PatchPoint(
        "megatron.core.optimizer.layer_wise_optimizer",
        "LayerWiseDistributedOptimizer.allgather_params",
        cpu.wrap_allgather_params,
        "self",
        "gathers parts of different sizes, which gloo refuses",
        cpu_only=True,
    ),
)
