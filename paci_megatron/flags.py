"""Megatron's flags that PACI refuses, and those that it switches off because training is the same without.

Both tables are applied before Megatron validates its arguments, which derives others from them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .config import ConfigError
from .simulate.balance import layout, partition


@dataclass(frozen=True, slots=True)
class Refused:
    """A flag that cannot be right, or is not supported: when, why, and what to do instead."""

    flag: str
    attribute: str
    reason: str
    remedy: str
    is_set: Callable[[Any], bool] = bool

    def message(self, value: Any) -> str:
        """The error for a command line that has it."""
        shown = "" if value is True else f" {value}"
        return f"{self.flag}{shown} does not work with --pipeline-schedule paci: {self.reason}. {self.remedy}."


@dataclass(frozen=True, slots=True)
class SwitchedOff:
    """A flag without which training is the same: its value then, why it is off, and what that costs, if anything.

    ``default`` is Megatron's own value where that is another: then the flag may be off without anybody having given it.
    """

    flag: str
    attribute: str
    value: Any
    reason: str
    cost: str = ""
    default: Any = None

    @property
    def line(self) -> str:
        """For the log, and for ``--paci-strict``'s error."""
        return f"{self.flag} is off under paci: {self.reason}{'; ' if self.cost else ''}{self.cost}"


def _unless(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


_REMOVE = "Remove the flag, or use --pipeline-schedule 1f1b"
_DUMPS = (
    "it saves tensors of one flushed iteration, and under paci an iteration's forwards and backwards interleave with others"
)
_LOGITS = (
    "Megatron hooks it to the output layer on every rank, so that it has it with one stage only",
    "Remove the flag, or use --pipeline-model-parallel-size 1 without paci",
)
_EVERY_STAGE = "it needs an agreement of all stages in every iteration, which would stop the pipeline each time"
REFUSED: tuple[Refused, ...] = (
    Refused("--use-megatron-fsdp", "use_megatron_fsdp", "parameters are gathered and freed per flush", _REMOVE),
    Refused("--use-torch-fsdp2", "use_torch_fsdp2", "parameters are gathered and freed per flush", _REMOVE),
    Refused(
        "--perform-rl-step", "perform_rl_step", "reinforcement learning needs a flushed pipeline in every step", _REMOVE
    ),
    Refused("--logits-load-dir", "logits_load_dir", *_LOGITS),
    Refused("--logits-save-dir", "logits_save_dir", *_LOGITS),
    Refused(
        "--export-kd-teacher-load",
        "export_kd_teacher_load",
        "ModelOpt's distillation sends the teacher's activations along with the student's, and paci's transfers are one "
        "tensor of one shape",
        _REMOVE,
    ),
    Refused(
        "--vision-pretraining-type",
        "vision_pretraining_type",
        "DINO changes gradients and the teacher's weights between Megatron's backward and step, which are paci's own",
        _REMOVE,
        lambda value: value == "dino",
    ),
    Refused(
        "--hybrid-context-parallel", "hybrid_context_parallel", "transfers have one shape, fixed before training", _REMOVE
    ),
    Refused(
        "--inprocess-restart",
        "inprocess_restart",
        "it aborts NCCL only, and a stage that waits for a neighbour's record waits over gloo until the time-out",
        "Use torchrun --max-restarts, with --save and --load",
    ),
    Refused(
        "--exit-signal-handler-for-training",
        "exit_signal_handler_for_training",
        _EVERY_STAGE,
        "Use --exit-interval, or --save-interval and resume from the last checkpoint",
    ),
    Refused("--save-params-interval", "save_params_interval", _DUMPS, _REMOVE),
    Refused("--save-activations-interval", "save_activations_interval", _DUMPS, _REMOVE),
    Refused("--save-tokens-per-expert-interval", "save_tokens_per_expert_interval", _DUMPS, _REMOVE),
    Refused("--save-wgrads-interval", "save_wgrads_interval", _DUMPS, _REMOVE),
    Refused("--save-dgrads-interval", "save_dgrads_interval", _DUMPS, _REMOVE),
    Refused("--moe-routing-trace-path", "moe_routing_trace_path", _DUMPS, _REMOVE),
    Refused(
        "--moe-expert-rank-capacity-factor",
        "moe_expert_rank_capacity_factor",
        "on overflow it repeats an iteration, which under paci others have already built on",
        _REMOVE,
    ),
)

_NO_BUBBLE = "there is no bubble to fill with smaller chunks"
_CHUNKS = (f"{_NO_BUBBLE}, so each stage holds one contiguous chunk",)
_GRAPHS = ("captured graphs replay a fixed order of micro-batches", "kernels are launched one by one")
_ACTIVATIONS = (
    "its buffers are reset once an iteration, when Megatron's pipeline is empty",
    "the activations stay on the GPU: add --recompute-granularity if they do not fit",
)
_COLLECTIVE = "it sums over all stages in every iteration"
_DEVICE = "it waits for the device, and with it for other stages' transfers"

SWITCHED_OFF: tuple[SwitchedOff, ...] = (
    SwitchedOff("--num-layers-per-virtual-pipeline-stage", "num_layers_per_virtual_pipeline_stage", None, *_CHUNKS),
    SwitchedOff("--num-virtual-stages-per-pipeline-rank", "num_virtual_stages_per_pipeline_rank", None, *_CHUNKS),
    SwitchedOff(
        *("--microbatch-group-size-per-virtual-pipeline-stage", "microbatch_group_size_per_vp_stage", None, *_CHUNKS)
    ),
    SwitchedOff(
        *("--overlap-p2p-communication-warmup-flush", "overlap_p2p_comm_warmup_flush", False),
        "no transfer between stages is waited for anyway",
    ),
    SwitchedOff(
        *("--overlap-param-gather-with-optimizer-step", "overlap_param_gather_with_optimizer_step", False),
        "Megatron has it for several chunks a stage only, and each stage holds one",
    ),
    SwitchedOff(
        *("--defer-embedding-wgrad-compute", "defer_embedding_wgrad_compute", False),
        "it moves work into the flush's bubble, and there is none",
    ),
    SwitchedOff(
        *("--overlap-moe-expert-parallel-comm", "overlap_moe_expert_parallel_comm", False),
        "it runs one micro-batch's forward together with another's backward, in an order of Megatron's own",
        "expert-parallel transfers are waited for",
    ),
    SwitchedOff(
        *("--delay-wgrad-compute", "delay_wgrad_compute", False),
        "it belongs to --overlap-moe-expert-parallel-comm, and weight gradients would come after the update",
    ),
    SwitchedOff("--cuda-graph-impl", "cuda_graph_impl", "none", *_GRAPHS),
    SwitchedOff("--enable-cuda-graph", "enable_cuda_graph", False, *_GRAPHS),
    SwitchedOff("--external-cuda-graph", "external_cuda_graph", False, *_GRAPHS),
    SwitchedOff("--cuda-graph-modules", "cuda_graph_modules", [], *_GRAPHS),
    SwitchedOff("--cuda-graph-scope", "cuda_graph_scope_deprecated", None, *_GRAPHS),
    SwitchedOff(
        *("--optimizer-cuda-graph", "optimizer_cuda_graph", False),
        "a captured step cannot be guarded for tensors in flight",
        "its kernels are launched one by one",
    ),
    SwitchedOff("--fine-grained-activation-offloading", "fine_grained_activation_offloading", False, *_ACTIVATIONS),
    SwitchedOff("--delay-offload-until-cuda-graph", "delay_offload_until_cuda_graph", False, *_ACTIVATIONS),
    SwitchedOff("--offload-modules", "offload_modules", [], *_ACTIVATIONS),
    SwitchedOff("--moe-paged-stash", "moe_paged_stash", False, *_ACTIVATIONS),
    SwitchedOff(
        *("--rerun-mode", "rerun_mode", "disabled"),
        "it keeps every batch and asks all ranks in every iteration",
        default="validate_results",
    ),
    SwitchedOff("--timing-log-level", "timing_log_level", 0, "its timers hold a barrier over all ranks"),
    SwitchedOff("--log-params-norm", "log_params_norm", False, _COLLECTIVE),
    SwitchedOff("--log-num-zeros-in-grad", "log_num_zeros_in_grad", False, _COLLECTIVE),
    SwitchedOff("--log-energy", "log_energy", False, "it gathers from all ranks"),
    SwitchedOff("--log-straggler", "log_straggler", False, "it gathers from all ranks"),
    SwitchedOff("--train-sync-interval", "train_sync_interval", None, _DEVICE),
    SwitchedOff("--empty-unused-memory-level", "empty_unused_memory_level", 0, _DEVICE),
)


def refusals(args: argparse.Namespace) -> list[str]:
    """The reason for each flag that is refused under PACI."""
    return [rule.message(value) for rule in REFUSED if rule.is_set(value := getattr(args, rule.attribute, None))]


def adapt_flags(args: argparse.Namespace) -> list[str]:
    """Switch off what is to be off under PACI; returns a line for each.

    ``ConfigError`` with every reason at once for flags that are refused, and with ``--paci-strict`` for those that would be
    switched off.
    """
    errors = refusals(args)
    off_by_default: list[str] = []
    lines: list[str] = []
    for rule in SWITCHED_OFF:
        if (value := getattr(args, rule.attribute, rule.value)) not in (rule.value, None):
            setattr(args, rule.attribute, rule.value)
            (off_by_default if value == rule.default else lines).append(rule.line)
    lines += one_chunk_a_stage(args) + gather_in_the_step(args)
    if args.paci_strict:
        errors += [f"--paci-strict: {line}. Remove the flag, or --paci-strict." for line in lines]
    if errors:
        raise ConfigError("\n".join(errors))
    return off_by_default + lines


def gather_in_the_step(args: argparse.Namespace) -> list[str]:
    """Switch ``--overlap-param-gather`` off where it would gather in the gradients' memory; the line that says so."""
    if not getattr(args, "overlap_param_gather", False):
        return []
    if getattr(args, "reuse_grad_buf_for_mxfp8_param_ag", False):
        cause = "--reuse-grad-buf-for-mxfp8-param-ag"
    elif args.optimizer not in ("adam", "sgd"):  # which Megatron then spreads by whole layers
        cause = f"--optimizer {args.optimizer}"
    else:
        return []
    args.overlap_param_gather = False
    return [
        f"--overlap-param-gather is off under paci: with {cause} the new weights may be gathered where the next backward's "
        "gradients go; the gather is waited for in the update"
    ]


def not_verified(args: argparse.Namespace) -> list[str]:
    """A line for each flag that no machine that the project was tested on could run."""
    return [
        f"{flag} {value} under paci is not verified on hardware: tested with stand-ins for Transformer Engine on a CPU. "
        "tools/gpu_check.py --only fp8 verifies it"
        for flag, value in (("--fp8-format", args.fp8), ("--fp4-format", args.fp4))
        if value
    ]


def one_chunk_a_stage(args: argparse.Namespace) -> list[str]:
    """Make a ``--pipeline-model-parallel-layout`` or ``--hybrid-layer-pattern`` of several chunks a stage one of one; the
    line that says so.

    A layout's stages get equal numbers of layers, as with ``--account-for-embedding-in-pipeline-split`` and
    ``--account-for-loss-in-pipeline-split``. A pattern's keep their number of chunks. Layers keep their order.
    """
    num_stages = args.paci_emulate_stages or args.pipeline_model_parallel_size
    pattern, separator, mtp_pattern = (getattr(args, "hybrid_layer_pattern", None) or "").partition("/")
    chunks_a_stage, rest = divmod(pattern.count("|") + 1, num_stages)
    if chunks_a_stage > 1 and not rest:
        parts = pattern.split("|")
        stages = ["".join(parts[i : i + chunks_a_stage]) for i in range(0, len(parts), chunks_a_stage)]
        args.hybrid_layer_pattern = "|".join(stages) + separator + mtp_pattern
        return [f"--hybrid-layer-pattern has one chunk a stage under paci: {args.hybrid_layer_pattern}; {_NO_BUBBLE}"]
    text = args.pipeline_model_parallel_layout
    if text is None:
        return []
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    chunks = PipelineParallelLayerLayout.parse_str_to_list(text)
    parts = [part for chunk in chunks for part in chunk]
    layers, ahead = parts.count(LayerType.decoder), parts.count(LayerType.mtp)
    if len(chunks) <= num_stages or len(chunks) % num_stages or layers + 2 < num_stages:
        return []
    # From the end, because of equally good partitions the first has less on the first stages, which are the last ones then.
    counts = partition([1.0 + ahead, *[1.0] * layers, 1.0], [0.0] * num_stages)[::-1]
    merged = args.pipeline_model_parallel_layout = layout(counts)[:-1] + "m" * ahead + "L"
    return [
        f"--pipeline-model-parallel-layout has one chunk a stage under paci: {merged}, which counts embedding (E), loss "
        f"(L) and prediction ahead (m) as a layer each; {_NO_BUBBLE}"
    ]
