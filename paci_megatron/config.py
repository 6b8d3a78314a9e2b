"""PACI's settings, and every reason to refuse a command line before training starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEDULES = ("1f1b", "paci")
CLIP_MODES = ("global", "stage", "none")
WEIGHT_POLICIES = ("latest", "stash", "double-buffer")
LINKS = ("p2p", "host")


class ConfigError(ValueError):
    """A command line that cannot work; the message names the value, the constraint and the remedy."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A Megatron flag that PACI refuses: when, why, and what to do instead."""

    flag: str
    attribute: str
    reason: str
    remedy: str
    is_set: Callable[[Any], bool] = bool

    def message(self, value: Any) -> str:
        """The error for a command line that has it."""
        shown = "" if value is True else f" {value}"
        return f"{self.flag}{shown} does not work with --pipeline-schedule paci: {self.reason}. {self.remedy}."


def _unless(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


_REMOVE = "Remove the flag, or use --pipeline-schedule 1f1b"
_QUANTIZED = (
    "scales and cached weights are tied to the forward's weight version, which an update in flight makes wrong",
    "Train in bf16 (--bf16), or use --pipeline-schedule 1f1b",
)
_DUMPS = (
    "it saves tensors of one flushed iteration, and under paci an iteration's forwards and backwards interleave with others"
)
_EVERY_STAGE = "it needs an agreement of all stages in every iteration, which would stop the pipeline each time"
_SCALED = ("a dynamic loss scale needs an agreement of all stages in every update", "Use --bf16 instead")
_VIRTUAL = (
    "paci schedules one model chunk per stage",
    "Remove the flag: without a bubble there is nothing to interleave for",
)

UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported("--num-layers-per-virtual-pipeline-stage", "num_layers_per_virtual_pipeline_stage", *_VIRTUAL),
    Unsupported("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank", *_VIRTUAL),
    Unsupported("--fp16", "fp16", *_SCALED),
    Unsupported("--loss-scale", "loss_scale", *_SCALED),
    Unsupported("--fp8-format", "fp8", *_QUANTIZED),
    Unsupported("--fp4-format", "fp4", *_QUANTIZED),
    Unsupported(
        "--mtp-num-layers", "mtp_num_layers", "multi-token prediction ties the first and last stage together", _REMOVE
    ),
    Unsupported(
        "--overlap-param-gather",
        "overlap_param_gather",
        "the gather would start in the next forward, and backwards before it would read half-updated weights",
        "Remove the flag: the distributed optimizer then gathers within its step",
    ),
    Unsupported(
        "--cuda-graph-impl",
        "cuda_graph_impl",
        "captured graphs replay a fixed order of micro-batches",
        "Use --cuda-graph-impl none",
        _unless(None, "none"),
    ),
    Unsupported(
        "--enable-cuda-graph", "enable_cuda_graph", "captured graphs replay a fixed order of micro-batches", _REMOVE
    ),
    Unsupported(
        "--external-cuda-graph", "external_cuda_graph", "captured graphs replay a fixed order of micro-batches", _REMOVE
    ),
    Unsupported(
        "--optimizer-cuda-graph", "optimizer_cuda_graph", "a captured step cannot be guarded for tensors in flight", _REMOVE
    ),
    Unsupported(
        "--defer-embedding-wgrad-compute",
        "defer_embedding_wgrad_compute",
        "it moves work into the flush's bubble, and there is none",
        "Remove the flag",
    ),
    Unsupported(
        "--overlap-moe-expert-parallel-comm",
        "overlap_moe_expert_parallel_comm",
        "it replaces the forward and backward by Megatron's combined schedule",
        _REMOVE,
    ),
    Unsupported("--delay-wgrad-compute", "delay_wgrad_compute", "the weight gradients would come after the update", _REMOVE),
    Unsupported(
        "--fine-grained-activation-offloading",
        "fine_grained_activation_offloading",
        "its buffers are reset at every flush",
        "Use --recompute-granularity to save memory",
    ),
    Unsupported(
        "--num-distributed-optimizer-instances",
        "num_distributed_optimizer_instances",
        "its gradient statistics use groups that span stages",
        "Use one instance",
        _unless(None, 1),
    ),
    Unsupported("--use-megatron-fsdp", "use_megatron_fsdp", "parameters are gathered and freed per flush", _REMOVE),
    Unsupported("--use-torch-fsdp2", "use_torch_fsdp2", "parameters are gathered and freed per flush", _REMOVE),
    Unsupported(
        "--optimizer",
        "optimizer",
        "its step involves ranks of several stages",
        "Use --optimizer adam or sgd",
        _unless(None, "adam", "sgd"),
    ),
    Unsupported("--qk-clip", "qk_clip", "it changes weights that micro-batches in flight have yet to use", _REMOVE),
    Unsupported("--log-max-attention-logit", "log_max_attention_logit", _EVERY_STAGE, _REMOVE),
    Unsupported(
        "--perform-rl-step", "perform_rl_step", "reinforcement learning needs a flushed pipeline in every step", _REMOVE
    ),
    Unsupported("--logits-load-dir", "logits_load_dir", "distillation is not tested under paci", _REMOVE),
    Unsupported("--logits-save-dir", "logits_save_dir", "distillation is not tested under paci", _REMOVE),
    Unsupported("--modelopt-enabled", "modelopt_enabled", "ModelOpt is not tested under paci", _REMOVE),
    Unsupported("--vision-pretraining", "vision_pretraining", "paci is tested with language models only", _REMOVE),
    Unsupported("--sft", "sft", "packed sequences reduce statistics over all stages in every iteration", _REMOVE),
    Unsupported(
        "--dataloader-inter-document-masking",
        "dataloader_inter_document_masking",
        "packed sequences reduce statistics over all stages in every iteration",
        _REMOVE,
    ),
    Unsupported(
        "--hybrid-context-parallel", "hybrid_context_parallel", "transfers have one shape, fixed before training", _REMOVE
    ),
    Unsupported("--adlr-autoresume", "adlr_autoresume", _EVERY_STAGE, _REMOVE),
    Unsupported(
        "--inprocess-restart", "inprocess_restart", "micro-batches in flight do not survive a restart in process", _REMOVE
    ),
    Unsupported(
        "--exit-signal-handler-for-training",
        "exit_signal_handler_for_training",
        _EVERY_STAGE,
        "Use --exit-interval, or --save-interval and resume from the last checkpoint",
    ),
    Unsupported("--save-params-interval", "save_params_interval", _DUMPS, _REMOVE),
    Unsupported("--save-activations-interval", "save_activations_interval", _DUMPS, _REMOVE),
    Unsupported("--save-tokens-per-expert-interval", "save_tokens_per_expert_interval", _DUMPS, _REMOVE),
    Unsupported("--save-wgrads-interval", "save_wgrads_interval", _DUMPS, _REMOVE),
    Unsupported("--save-dgrads-interval", "save_dgrads_interval", _DUMPS, _REMOVE),
    Unsupported("--moe-routing-trace-path", "moe_routing_trace_path", _DUMPS, _REMOVE),
    Unsupported("--moe-paged-stash", "moe_paged_stash", "its buffers are reset at every flush", _REMOVE),
    Unsupported(
        "--moe-expert-rank-capacity-factor",
        "moe_expert_rank_capacity_factor",
        "on overflow it repeats an iteration, which under paci others have already built on",
        _REMOVE,
    ),
    Unsupported(
        "--dsa-indexer-loss-coeff",
        "dsa_indexer_loss_coeff",
        "its metrics are reduced over all stages in every iteration",
        _REMOVE,
    ),
)

# Logs and checks that would stop the pipeline. They are switched off with a line in the log, since training is the same
# without them: (argument, value under paci, flag as the user wrote it, why).
OVERRIDES: tuple[tuple[str, Any, str, str], ...] = (
    ("rerun_mode", "disabled", "--rerun-mode", "it keeps every batch and asks all ranks in every iteration"),
    ("timing_log_level", 0, "--timing-log-level", "its timers hold a barrier over all ranks"),
    ("log_params_norm", False, "--log-params-norm", "it sums over all stages in every iteration"),
    ("log_num_zeros_in_grad", False, "--log-num-zeros-in-grad", "it sums over all stages in every update"),
    ("log_energy", False, "--log-energy", "it gathers from all ranks"),
    ("log_straggler", False, "--log-straggler", "it gathers from all ranks"),
    (
        "train_sync_interval",
        None,
        "--train-sync-interval",
        "it waits for the device, and with it for transfers of other stages",
    ),
    (
        "empty_unused_memory_level",
        0,
        "--empty-unused-memory-level",
        "freeing memory waits for the device, and with it for transfers of other stages",
    ),
)


@dataclass(frozen=True)
class PaciConfig:
    """What PACI needs to know, taken from Megatron's validated arguments."""

    num_stages: int
    schedule: str = "paci"
    emulates: bool = False  # all stages in one process
    clip_mode: str = "none"
    drain_interval: int | None = None
    extra_in_flight: int = 0
    weight_policy: str = "latest"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PaciConfig:
        """The configuration of a validated command line; ``ConfigError`` if PACI cannot run it.

        When stages are emulated, ``args.pipeline_model_parallel_size`` is their number.
        """
        num_stages = args.pipeline_model_parallel_size
        if num_stages < 2:
            raise ConfigError(
                f"--pipeline-schedule paci with --pipeline-model-parallel-size {num_stages}: a pipeline of one stage has "
                "no bubble and no other stage to run ahead of. Remove --pipeline-schedule paci, or give the pipeline two "
                "stages or more, or emulate them in one process with --paci-emulate-stages N."
            )
        if getattr(args, "virtual_pipeline_model_parallel_size", None) is not None:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} puts "
                f"{args.virtual_pipeline_model_parallel_size} model chunks on a stage; paci schedules one. Write a layout "
                f"with {num_stages} stages."
            )
        _check_layout(args)
        _check_weight_policy(args)
        return cls(
            num_stages,
            schedule=args.pipeline_schedule,
            emulates=args.paci_emulate_stages is not None,
            clip_mode=args.paci_clip_mode if args.clip_grad else "none",
            drain_interval=args.paci_drain_interval,
            extra_in_flight=args.paci_extra_in_flight,
            weight_policy=args.paci_weight_policy,
        )


NUMBERS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("--paci-drain-interval", "paci_drain_interval", lambda n: n is None or n >= 1, "at least 1 update"),
    ("--paci-extra-in-flight", "paci_extra_in_flight", lambda n: n >= 0, "0 or a number of micro-batches"),
    ("--paci-start-iteration", "paci_start_iteration", lambda n: n >= 0, "0 (off) or a number of iterations"),
    ("--paci-fallback", "paci_fallback", lambda n: n >= 0, "0 (off) or a number of iterations"),
    (
        "--paci-transfer-timeout",
        "paci_transfer_timeout",
        lambda s: s is None or 0 < s < math.inf,
        "a number of seconds, more than 0",
    ),
)
"""Flag, argument, which values make sense (of NaN no comparison is true), and in words."""


def check_options(args: argparse.Namespace) -> None:
    """``ConfigError`` if an option of PACI has a number that makes no sense, or is one that the schedule would not use."""
    for flag, name, makes_sense, meaning in NUMBERS:
        value = getattr(args, name)
        if not makes_sense(value):
            raise ConfigError(f"{flag} {value}: must be {meaning}.")
    # Megatron itself clips only above 0.
    if args.pipeline_schedule == "paci" and not 0 <= args.clip_grad < math.inf:
        raise ConfigError(f"--clip-grad {args.clip_grad}: must be a norm of gradients, or 0, which clips nothing.")
    if args.paci_weight_policy != "latest" and args.pipeline_schedule != "paci":
        raise ConfigError(
            f"--paci-weight-policy {args.paci_weight_policy} with --pipeline-schedule {args.pipeline_schedule}: a flushed "
            "pipeline has one weight version. Add --pipeline-schedule paci, or remove the flag."
        )
    if args.paci_extra_in_flight and args.pipeline_schedule != "paci":
        raise ConfigError(
            f"--paci-extra-in-flight {args.paci_extra_in_flight} with --pipeline-schedule {args.pipeline_schedule}: a flush "
            "leaves nothing in flight. Add --pipeline-schedule paci, or remove the flag."
        )
    if args.paci_link != "p2p" and args.paci_emulate_stages is not None:
        raise ConfigError(
            f"--paci-link {args.paci_link} with --paci-emulate-stages {args.paci_emulate_stages}: emulated stages share a "
            "process and hand tensors over. Remove one of the two."
        )
    if args.paci_trace_dir is not None:
        _check_trace(args)


def _check_trace(args: argparse.Namespace) -> None:
    """``ConfigError`` if a stage has several model chunks, which a trace does not tell apart."""
    for attribute in ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"):
        value = getattr(args, attribute, None)
        if value is not None:
            raise ConfigError(
                f"--paci-trace-dir {args.paci_trace_dir} with --{attribute.replace('_', '-')} {value}: a trace knows one "
                "model chunk a stage. Remove one of the two."
            )
    num_stages, text = args.paci_emulate_stages or args.pipeline_model_parallel_size, args.pipeline_model_parallel_layout
    if text is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

        chunks = PipelineParallelLayerLayout.get_num_stages_from_str(text)
        if chunks > num_stages:
            raise ConfigError(
                f"--paci-trace-dir {args.paci_trace_dir} with --pipeline-model-parallel-layout {text}: {chunks} model "
                f"chunks on {num_stages} stages, and a trace knows one a stage. Remove one of the two."
            )


def check_host_link_on_gpu(args: argparse.Namespace) -> None:
    """``ConfigError`` if ``--paci-link host`` on a GPU meets what needs collectives that gloo has for CPU tensors only."""
    for flag, name, allowed in (
        ("--tensor-model-parallel-size", "tensor_model_parallel_size", 1),
        ("--context-parallel-size", "context_parallel_size", 1),
        ("--expert-model-parallel-size", "expert_model_parallel_size", 1),
        ("--use-distributed-optimizer", "use_distributed_optimizer", False),
        ("--overlap-grad-reduce", "overlap_grad_reduce", False),
    ):
        value = getattr(args, name)
        if value != allowed:
            shown = flag if value is True else f"{flag} {value}"
            raise ConfigError(
                f"--paci-link host with {shown} on a GPU: it needs collectives that gloo has for tensors on a CPU only. "
                f"Remove {flag}, or give each rank a GPU and use --paci-link p2p."
            )


def check_emulation(args: argparse.Namespace) -> None:
    """``ConfigError`` unless ``--paci-emulate-stages`` fits the rest of the command line."""
    num_stages, pipeline, layers = args.paci_emulate_stages, args.pipeline_model_parallel_size, args.num_layers
    if num_stages < 2:
        raise ConfigError(f"--paci-emulate-stages {num_stages}: a pipeline has at least 2 stages.")
    if pipeline != 1:
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --pipeline-model-parallel-size {pipeline}: emulated stages live in "
            "one process, so the pipeline size must be 1. Remove one of the two."
        )
    if (args.save or args.load) and args.ckpt_format != "torch_dist":
        raise ConfigError(
            f"--paci-emulate-stages with --ckpt-format {args.ckpt_format}: only a torch_dist checkpoint holds all stages in "
            "one. Use --ckpt-format torch_dist."
        )
    if layers is not None and layers < num_stages:
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --num-layers {layers}: each stage needs a layer. Emulate at most "
            f"{layers} stages."
        )


def _check_layout(args: argparse.Namespace) -> None:
    """``ConfigError`` if ``--pipeline-model-parallel-layout`` leaves a stage with nothing to do."""
    text = args.pipeline_model_parallel_layout
    if text is None:
        return
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for stage, layers in enumerate(PipelineParallelLayerLayout.parse_str_to_list(text)):
        if not layers:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {text} leaves stage {stage} empty: it would only pass tensors "
                "on. Give it a layer, or use fewer stages."
            )


def _check_weight_policy(args: argparse.Namespace) -> None:
    """``ConfigError`` if double-buffer, which holds two versions of the weights, would need a third."""
    if args.paci_weight_policy != "double-buffer":
        return
    num_stages = args.pipeline_model_parallel_size
    if args.step_batch_size_schedule is not None:
        raise ConfigError(
            "--paci-weight-policy double-buffer needs the same number of micro-batches in every update. Remove "
            "--step-batch-size-schedule."
        )
    a = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    needed = num_stages - 1 + args.paci_extra_in_flight
    if a < needed:
        raise ConfigError(
            f"--paci-weight-policy double-buffer with {num_stages} stages and {a} micro-batches per update: two weight "
            f"versions are enough only with at least {needed} micro-batches per update. Raise --global-batch-size "
            f"to {needed * args.micro_batch_size * args.data_parallel_size}."
        )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse the first flag of :data:`UNSUPPORTED` that is set, with a ``ConfigError``."""
    for rule in UNSUPPORTED:
        value = getattr(args, rule.attribute, None)
        if rule.is_set(value):
            raise ConfigError(rule.message(value))


def apply_overrides(args: argparse.Namespace) -> list[str]:
    """Switch off what would stop the pipeline; returns one line for each that was on."""
    lines = []
    for attribute, value, flag, why in OVERRIDES:
        if getattr(args, attribute, value) != value:
            setattr(args, attribute, value)
            lines.append(f"{flag} is off under paci: {why}")
    return lines
