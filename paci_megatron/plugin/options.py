"""Checks of PACI's own options, before Megatron sees any, as far as they can be told from the command line alone."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from paci_megatron.config import ConfigError, extra_of, fold_of, memory_budget, stages_per_process

NUMBERS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("--paci-drain-interval", "paci_drain_interval", lambda n: n is None or n >= 1, "at least 1 update"),
    ("--paci-start-iteration", "paci_start_iteration", lambda n: n >= 0, "0 (off) or a number of iterations"),
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
    if schedule != "1f1b" and not 0 <= args.clip_grad < math.inf:
        errors.append(f"--clip-grad {args.clip_grad}: must be a norm of gradients, or 0, which clips nothing.")
    if args.paci_weight_policy != "latest" and schedule == "1f1b":
        errors.append(
            f"--paci-weight-policy {args.paci_weight_policy} with --pipeline-schedule {schedule}: a flushed pipeline has "
            "one weight version. Add --pipeline-schedule paci, or remove the flag."
        )
    if args.paci_link != "p2p" and args.paci_emulate_stages is not None:
        errors.append(
            f"--paci-link {args.paci_link} with --paci-emulate-stages {args.paci_emulate_stages}: emulated stages share a "
            "process and hand tensors over. Remove one of the two."
        )
    for check in (_check_slack, _check_v, _check_trace):
        try:
            check(args)
        except ConfigError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


def _check_v(args: argparse.Namespace) -> None:
    """``ConfigError`` for what a V cannot do."""
    if args.pipeline_schedule != "paci-v":
        return
    fold_of(args)
    stages, more = args.paci_emulate_stages, args.paci_extra_in_flight
    if stages is not None and stages % 2:
        raise ConfigError(
            f"--paci-emulate-stages {stages} with --pipeline-schedule paci-v: a V has two stages on each process. Give an "
            "even number."
        )
    if str(more).strip("0,"):
        raise ConfigError(
            f"--paci-extra-in-flight {more} with --pipeline-schedule paci-v: its order says what is in flight. Remove the "
            "flag; --paci-v-order 1:2:1 leaves each tensor time between two processes."
        )
    if stages is None and args.paci_transfer_dtype != "model":
        raise ConfigError(
            f"--paci-transfer-dtype {args.paci_transfer_dtype} with --pipeline-schedule paci-v: evaluations, never "
            "rounded, go through the same transfers as training. Remove the flag."
        )
    size = getattr(args, "eval_micro_batch_size", None)
    if stages is None and size not in (None, args.micro_batch_size):
        raise ConfigError(
            f"--eval-micro-batch-size {size} with --pipeline-schedule paci-v: evaluations go through the same transfers as "
            f"training. Give {args.micro_batch_size}, or remove the flag."
        )


def _check_slack(args: argparse.Namespace) -> None:
    extra, budget = extra_of(args), args.paci_memory_budget
    if any(memory_budget(budget)) and not extra.is_auto:
        raise ConfigError(
            f"--paci-memory-budget {budget} with --paci-extra-in-flight {args.paci_extra_in_flight}: it bounds what auto "
            "chooses. Remove it, or give --paci-extra-in-flight auto."
        )
    if extra.is_auto and args.paci_emulate_stages is not None:
        raise ConfigError(
            f"--paci-extra-in-flight auto with --paci-emulate-stages {args.paci_emulate_stages}: emulated stages take turns "
            "and wait for nobody, so there is nothing to measure. Give a number, or the metrics file of a run with auto."
        )
    if str(args.paci_extra_in_flight).strip("0,") and args.pipeline_schedule == "1f1b":
        raise ConfigError(
            f"--paci-extra-in-flight {args.paci_extra_in_flight} with --pipeline-schedule {args.pipeline_schedule}: a flush "
            "leaves nothing in flight. Add --pipeline-schedule paci, or remove the flag."
        )


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


def check_emulation(args: argparse.Namespace) -> None:
    """``ConfigError`` unless several stages in a process fit the rest of the command line."""
    num_stages, pipeline, layers = args.paci_emulate_stages, args.pipeline_model_parallel_size, args.num_layers
    several = "--pipeline-schedule paci-v" if num_stages is None else f"--paci-emulate-stages {num_stages}"
    if num_stages is None and stages_per_process(args) == 1:
        return
    if (args.save or args.load) and args.ckpt_format != "torch_dist":
        raise ConfigError(
            f"{several} with --ckpt-format {args.ckpt_format}: only a torch_dist checkpoint holds all stages of a process. "
            "Use --ckpt-format torch_dist."
        )
    if args.fp8 and args.fp8_recipe == "delayed":
        raise ConfigError(
            f"{several} with --fp8-recipe delayed: Transformer Engine keeps one history of scales in a process, which all "
            "its stages would advance. Use --fp8-recipe tensorwise, blockwise or mxfp8."
        )
    if getattr(args, "skip_train", False):
        raise ConfigError(
            f"{several} with --skip-train: an evaluation alone needs no schedule. Remove it; any checkpoint loads with any "
            "--pipeline-model-parallel-size."
        )
    if num_stages is None:
        return
    if num_stages < 2:
        raise ConfigError(f"--paci-emulate-stages {num_stages}: a pipeline has at least 2 stages.")
    if pipeline != 1:
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --pipeline-model-parallel-size {pipeline}: emulated stages live in "
            "one process, so the pipeline size must be 1. Remove one of the two."
        )
    if layers is not None and layers < num_stages:
        raise ConfigError(
            f"--paci-emulate-stages {num_stages} with --num-layers {layers}: each stage needs a layer. Emulate at most "
            f"{layers} stages."
        )
