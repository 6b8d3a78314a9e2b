"""PACI's settings, and the values that cannot work. Megatron's own flags are in flags.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schedule.schedules import parse_slack
from .telemetry.run_events import slack_choices
from .usage import UsageError

SCHEDULES = ("1f1b", "paci")
CLIP_MODES = ("global", "stage", "none")
WEIGHT_POLICIES = ("latest", "stash", "double-buffer")
LINKS = ("p2p", "host")
TRANSFER_DTYPES = ("model", "bf16")
AUTO = "auto"
"""A value of ``--paci-extra-in-flight``."""


class ConfigError(UsageError):
    """A command line that cannot work; the message names the value, the constraint and the remedy."""


@dataclass(frozen=True)
class Extra:
    """What ``--paci-extra-in-flight`` says: the slack of the links (schedule/schedules.py) from after an iteration on.

    ``choices`` has all of it where it is given, or was chosen by an earlier run; where this run chooses (``is_auto``) only
    the first, none. ``most`` is the most that the first stage ever has more.
    """

    choices: tuple[tuple[int, tuple[int, ...]], ...] = ()
    most: int = 0
    is_auto: bool = False

    @staticmethod
    def measured_updates(record_lag: int) -> int:
        """How many updates are measured before the run chooses."""
        return 2 * record_lag + 8


@dataclass(frozen=True)
class PaciConfig:
    """What PACI needs to know, taken from Megatron's validated arguments."""

    num_stages: int
    schedule: str = "paci"
    emulates: bool = False  # all stages in one process
    clip_mode: str = "none"
    drain_interval: int | None = None
    slack: tuple[int, ...] = ()  # by link, see schedule/schedules.py; of the first plan
    extra: Extra = Extra()
    weight_policy: str = "latest"

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PaciConfig:
        """The configuration of a validated command line; ``ConfigError`` if PACI cannot run it.

        When stages are emulated, ``args.pipeline_model_parallel_size`` is their number.
        """
        check_num_stages(args)
        num_stages = args.pipeline_model_parallel_size
        if getattr(args, "virtual_pipeline_model_parallel_size", None) is not None:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} puts "
                f"{args.virtual_pipeline_model_parallel_size} model chunks on a stage; paci schedules one. Write a layout "
                f"with {num_stages} stages."
            )
        if getattr(args, "use_layer_wise_distributed_optimizer", False):
            raise ConfigError(
                f"--optimizer {args.optimizer} with --use-distributed-optimizer: Megatron then spreads whole layers over "
                "ranks and takes the gradient norm over the world. Remove --use-distributed-optimizer."
            )
        _check_layout(args)
        _check_packing(args)
        _check_weight_policy(args)
        check_in_flight(args)
        extra = extra_of(args)
        return cls(
            num_stages,
            schedule=args.pipeline_schedule,
            emulates=args.paci_emulate_stages is not None,
            clip_mode=args.paci_clip_mode if args.clip_grad else "none",
            drain_interval=args.paci_drain_interval,
            slack=extra.choices[0][1],
            extra=extra,
            weight_policy=args.paci_weight_policy,
        )


NUMBERS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("--paci-drain-interval", "paci_drain_interval", lambda n: n is None or n >= 1, "at least 1 update"),
    ("--paci-start-iteration", "paci_start_iteration", lambda n: n >= 0, "0 (off) or a number of iterations"),
    ("--paci-memory-budget", "paci_memory_budget", lambda n: n is None or n >= 1, "a number of micro-batches"),
    ("--paci-transfer-ctas", "paci_transfer_ctas", lambda n: n is None or 1 <= n <= 64, "1 to 64 thread blocks"),
    ("--paci-fallback", "paci_fallback", lambda n: n >= 0, "0 (off) or a number of iterations"),
    (
        "--paci-transfer-timeout",
        "paci_transfer_timeout",
        lambda s: s is None or 0 < s < math.inf,
        "a number of seconds, more than 0",
    ),
)
"""Flag, argument, which values make sense (of NaN no comparison is true), and in words."""


def together(*checks: Callable[[], list[str] | None]) -> list[str]:
    """Run all checks; the lines that they return. One ``ConfigError`` with the messages of all that raise one."""
    lines, errors = [], []
    for check in checks:
        try:
            lines += check() or []
        except ConfigError as error:
            errors += str(error).split("\n")
    if len(errors) > 1:
        raise ConfigError("\n  ".join([f"{len(errors)} reasons:", *errors]))
    if errors:
        raise ConfigError(errors[0])
    return lines


def check_options(args: argparse.Namespace) -> None:
    """``ConfigError`` if options of PACI have numbers that make no sense, or are some that the schedule would not use; a
    line for each.
    """
    schedule, errors = args.pipeline_schedule, []
    for flag, name, makes_sense, meaning in NUMBERS:
        value = getattr(args, name)
        if not makes_sense(value):
            errors.append(f"{flag} {value}: must be {meaning}.")
    # Megatron itself clips only above 0.
    if schedule == "paci" and not 0 <= args.clip_grad < math.inf:
        errors.append(f"--clip-grad {args.clip_grad}: must be a norm of gradients, or 0, which clips nothing.")
    if args.paci_weight_policy != "latest" and schedule != "paci":
        errors.append(
            f"--paci-weight-policy {args.paci_weight_policy} with --pipeline-schedule {schedule}: a flushed pipeline has "
            "one weight version. Add --pipeline-schedule paci, or remove the flag."
        )
    if args.paci_link != "p2p" and args.paci_emulate_stages is not None:
        errors.append(
            f"--paci-link {args.paci_link} with --paci-emulate-stages {args.paci_emulate_stages}: emulated stages share a "
            "process and hand tensors over. Remove one of the two."
        )
    for check in (_check_slack, _check_trace):
        try:
            check(args)
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def _check_slack(args: argparse.Namespace) -> None:
    extra, budget = extra_of(args), args.paci_memory_budget or 0
    if budget > 0 and not extra.is_auto:
        raise ConfigError(
            f"--paci-memory-budget {budget} with --paci-extra-in-flight {args.paci_extra_in_flight}: it bounds what auto "
            "chooses. Remove it, or give --paci-extra-in-flight auto."
        )
    if extra.is_auto and args.paci_emulate_stages is not None:
        raise ConfigError(
            f"--paci-extra-in-flight auto with --paci-emulate-stages {args.paci_emulate_stages}: emulated stages take turns "
            "and wait for nobody, so there is nothing to measure. Give a number, or the metrics file of a run with auto."
        )
    if str(args.paci_extra_in_flight).strip("0,") and args.pipeline_schedule != "paci":
        raise ConfigError(
            f"--paci-extra-in-flight {args.paci_extra_in_flight} with --pipeline-schedule {args.pipeline_schedule}: a flush "
            "leaves nothing in flight. Add --pipeline-schedule paci, or remove the flag."
        )


def check_num_stages(args: argparse.Namespace) -> None:
    """``ConfigError`` for a pipeline of one stage."""
    num_stages = args.pipeline_model_parallel_size
    if num_stages < 2:
        raise ConfigError(
            f"--pipeline-schedule paci with --pipeline-model-parallel-size {num_stages}: a pipeline of one stage has "
            "no bubble and no other stage to run ahead of. Remove --pipeline-schedule paci, or give the pipeline two "
            "stages or more, or emulate them in one process with --paci-emulate-stages N."
        )


def check_in_flight(args: argparse.Namespace) -> None:
    """``ConfigError`` if the first stage could hold more micro-batches in flight than there are in the whole training, or if
    the training ends before PACI begins.
    """
    iters, sizes = getattr(args, "train_iters", None), (args.global_batch_size, args.micro_batch_size)
    if not iters or None in sizes:
        return
    if args.pipeline_schedule == "paci" and args.paci_start_iteration >= iters:
        raise ConfigError(
            f"--paci-start-iteration {args.paci_start_iteration} with --train-iters {iters}: the training ends before PACI "
            f"begins. Give less than {iters}, or remove --pipeline-schedule paci."
        )
    extra, num_stages = extra_of(args), args.paci_emulate_stages or args.pipeline_model_parallel_size
    slack = 0 if extra.is_auto else extra.most
    total = iters * (args.global_batch_size // (args.micro_batch_size * args.data_parallel_size))
    if args.step_batch_size_schedule is None and slack and num_stages + slack > total:
        raise ConfigError(
            f"--paci-extra-in-flight {args.paci_extra_in_flight}: {num_stages + slack} micro-batches in flight at the first "
            f"stage, and the whole training has {total}. Give at most {max(total - num_stages, 0)}."
        )


def extra_of(args: argparse.Namespace) -> Extra:
    """What ``--paci-extra-in-flight`` says; ``ConfigError`` if it says nothing that makes sense."""
    text, num_stages = str(args.paci_extra_in_flight), args.paci_emulate_stages or args.pipeline_model_parallel_size
    none = (0, (0,) * (num_stages - 1))
    if text == AUTO:
        budget = 2 * num_stages if args.paci_memory_budget is None else args.paci_memory_budget
        if budget < num_stages:
            raise ConfigError(
                f"--paci-memory-budget {budget}: {num_stages} stages have {num_stages} micro-batches in flight at the first "
                f"without any more. Give at least {num_stages}."
            )
        return Extra((none,), budget - num_stages, is_auto=True)
    try:
        if Path(text).is_file():
            choices = (none, *slack_choices(Path(text), num_stages))
            return Extra(choices, max(sum(slack) for _, slack in choices))
        slack = parse_slack(text, num_stages)
    except ValueError as error:
        raise ConfigError(f"--paci-extra-in-flight {error}; or auto, or the metrics file of a run with auto.") from None
    return Extra(((0, slack),), sum(slack))


def _check_trace(args: argparse.Namespace) -> None:
    """``ConfigError`` if a trace is asked for and a stage has several model chunks, which it does not tell apart."""
    if args.paci_trace_dir is None:
        return
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
    if num_stages is None:
        return
    if num_stages < 2:
        raise ConfigError(f"--paci-emulate-stages {num_stages}: a pipeline has at least 2 stages.")
    if pipeline != 1:
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --pipeline-model-parallel-size {pipeline}: emulated stages live in "
            "one process, so the pipeline size must be 1. Remove one of the two."
        )
    if args.fp8 and args.fp8_recipe == "delayed":
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --fp8-recipe delayed: Transformer Engine keeps one history of scales "
            "in a process, which all stages would advance. Use --fp8-recipe tensorwise, blockwise or mxfp8."
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
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(text)
    if any(LayerType.mtp in layers for layers in stages[:-1]):
        raise ConfigError(
            f"--pipeline-model-parallel-layout {text} has multi-token prediction (m) before the last stage: the embedding "
            "would be on three stages, and paci keeps two the same. Put m on the last stage."
        )
    for stage, layers in enumerate(stages):
        if not layers:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {text} leaves stage {stage} empty: it would only pass tensors "
                "on. Give it a layer, or use fewer stages."
            )


def _check_packing(args: argparse.Namespace) -> None:
    """``ConfigError`` if a micro-batch of packed sequences has several samples."""
    flag = "--sft" if args.sft else "--dataloader-inter-document-masking"
    if (args.sft or args.dataloader_inter_document_masking) and args.micro_batch_size > 1:
        raise ConfigError(
            f"{flag} with --micro-batch-size {args.micro_batch_size} on several stages: Megatron packs a micro-batch into "
            "one sequence, and its transfers between stages keep the samples apart. Use --micro-batch-size 1 and a larger "
            "--seq-length."
        )


def _check_weight_policy(args: argparse.Namespace) -> None:
    """``ConfigError`` if double-buffer, which holds two versions of the weights, would need a third, or if what is computed
    with are quantised weights, of which nobody keeps an older version.
    """
    for flag, value in (("--fp8-format", args.fp8), ("--fp4-format", args.fp4)):
        if value and args.paci_weight_policy != "latest":
            raise ConfigError(
                f"--paci-weight-policy {args.paci_weight_policy} with {flag} {value}: quantised weights are kept in one "
                f"version, the newest. Remove {flag}, or use --paci-weight-policy latest."
            )
    if args.paci_weight_policy != "double-buffer":
        return
    num_stages = args.pipeline_model_parallel_size
    if args.step_batch_size_schedule is not None:
        raise ConfigError(
            "--paci-weight-policy double-buffer needs the same number of micro-batches in every update. Remove "
            "--step-batch-size-schedule."
        )
    a = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    needed = num_stages - 1 + extra_of(args).most
    if a < needed:
        raise ConfigError(
            f"--paci-weight-policy double-buffer with {num_stages} stages and {a} micro-batches per update: two weight "
            f"versions are enough only with at least {needed} micro-batches per update. Raise --global-batch-size "
            f"to {needed * args.micro_batch_size * args.data_parallel_size}."
        )
