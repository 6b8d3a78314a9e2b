"""PACI's settings, and the values that cannot work. Megatron's own flags are in flags.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .schedule.schedules import parse_slack
from .schedule.vee import Fold, fold
from .telemetry.run_events import slack_choices
from .usage import UsageError

SCHEDULES = ("1f1b", "paci", "paci-v")
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
    the first, none. ``most`` is the most that the first stage ever has more, ``most_bytes`` the most that it may keep for
    backwards, where a run is bounded by that, too.
    """

    choices: tuple[tuple[int, tuple[int, ...]], ...] = ()
    most: int = 0
    is_auto: bool = False
    most_bytes: int | None = None

    @staticmethod
    def measured_updates(record_lag: int) -> int:
        """How many updates are measured before the run chooses."""
        return 2 * record_lag + 8


@dataclass(frozen=True)
class PaciConfig:
    """What PACI needs to know, taken from Megatron's validated arguments."""

    num_stages: int
    schedule: str = "paci"
    stages_per_process: int = 1  # 2 in a V, all where they are emulated
    clip_mode: str = "none"
    drain_interval: int | None = None
    slack: tuple[int, ...] = ()  # by link, see schedule/schedules.py; of the first plan
    extra: Extra = Extra()
    weight_policy: str = "latest"
    folded: Fold | None = None  # the order of paci-v
    look_ahead: bool = False

    @property
    def emulates(self) -> bool:
        """Whether all stages are in one process."""
        return self.stages_per_process == self.num_stages

    @property
    def num_processes(self) -> int:
        """Of the pipeline, emulated or not."""
        return self.num_stages if self.folded is None else self.num_stages // 2

    def held_stages(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages of the process of that rank in the pipeline, in order.

        A V has its ends, and with them the loss, on the last rank, which is where Megatron logs.
        """
        if self.emulates:
            return tuple(range(self.num_stages))
        if self.folded is None:
            return (pipeline_rank,)
        process = self.num_processes - 1 - pipeline_rank
        return process, self.num_stages - 1 - process

    def stage_ranks(self, pipeline: Sequence[int]) -> list[int]:
        """The rank of each stage's process, first stage to last; ``pipeline`` are the ranks of this pipeline."""
        held = {stage: rank for at, rank in enumerate(pipeline) for stage in self.held_stages(at)}
        return [held[stage] for stage in range(self.num_stages)]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> PaciConfig:
        """The configuration of a validated command line; ``ConfigError`` if PACI cannot run it.

        ``args.pipeline_model_parallel_size`` is the number of stages, however many a process has of them.
        """
        check_num_stages(args)
        num_stages = args.pipeline_model_parallel_size
        if getattr(args, "virtual_pipeline_model_parallel_size", None) is not None:
            raise ConfigError(
                f"--pipeline-model-parallel-layout {args.pipeline_model_parallel_layout} puts "
                f"{args.virtual_pipeline_model_parallel_size} model chunks on a stage; paci schedules one. Write a layout "
                f"with {num_stages} stages."
            )
        if getattr(args, "use_layer_wise_distributed_optimizer", False) and not args.bf16:
            raise ConfigError(
                f"--optimizer {args.optimizer} with --use-distributed-optimizer and without --bf16: Megatron's optimizer "
                "that spreads whole layers over ranks works in bf16 only. Add --bf16, or remove --use-distributed-optimizer."
            )
        _check_layout(args)
        _check_packing(args)
        _check_weight_policy(args)
        _check_look_ahead(args)
        check_in_flight(args)
        extra = extra_of(args)
        return cls(
            num_stages,
            schedule=args.pipeline_schedule,
            stages_per_process=stages_per_process(args),
            clip_mode=args.paci_clip_mode if args.clip_grad else "none",
            drain_interval=args.paci_drain_interval,
            slack=extra.choices[0][1],
            extra=extra,
            weight_policy=args.paci_weight_policy,
            folded=fold_of(args),
            look_ahead=args.paci_look_ahead and args.pipeline_schedule != "1f1b",
        )


def stages_per_process(args: argparse.Namespace) -> int:
    """How many stages each process has: one as a rule, all emulated ones, two of a V."""
    return args.paci_emulate_stages or (2 if args.pipeline_schedule == "paci-v" else 1)


def count_stages(args: argparse.Namespace) -> None:
    """Make ``args.pipeline_model_parallel_size`` the number of stages where processes have two: to be called once, first."""
    if args.paci_emulate_stages is None:
        args.pipeline_model_parallel_size *= stages_per_process(args)


def fold_of(args: argparse.Namespace) -> Fold | None:
    """The order of ``paci-v``; None under another schedule. ``ConfigError`` if ``--paci-v-order`` is none."""
    if args.pipeline_schedule != "paci-v":
        return None
    try:
        forward, backward, wait = map(int, args.paci_v_order.split(":"))
        return fold(max((args.paci_emulate_stages or args.pipeline_model_parallel_size) // 2, 1), forward, backward, wait)
    except ValueError as error:
        reason = str(error) if str(error).startswith("no V") else "expected FORWARD:BACKWARD:WAIT, like 1:2:0"
        raise ConfigError(f"--paci-v-order {args.paci_v_order}: {reason}.") from None


def check_num_stages(args: argparse.Namespace) -> None:
    """``ConfigError`` for a pipeline of one process."""
    num_stages = args.pipeline_model_parallel_size
    if args.pipeline_schedule == "paci-v" and num_stages < 4:
        raise ConfigError(
            "--pipeline-schedule paci-v on one process, with two stages: it has no other to share a V with. Give "
            "--pipeline-model-parallel-size 2 or more, or emulate the stages in one process with --paci-emulate-stages 4."
        )
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
    if args.pipeline_schedule != "1f1b" and args.paci_start_iteration >= iters:
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
    """What ``--paci-extra-in-flight``, or the order of a V, says; ``ConfigError`` if it says nothing that makes sense."""
    if (folded := fold_of(args)) is not None:
        return Extra(((0, folded.slack),))
    text, num_stages = str(args.paci_extra_in_flight), args.paci_emulate_stages or args.pipeline_model_parallel_size
    none = (0, (0,) * (num_stages - 1))
    if text == AUTO:
        budget, most_bytes = memory_budget(args.paci_memory_budget)
        budget = 2 * num_stages if budget is None else budget
        if budget < num_stages:
            raise ConfigError(
                f"--paci-memory-budget {budget}: {num_stages} stages have {num_stages} micro-batches in flight at the first "
                f"without any more. Give at least {num_stages}."
            )
        return Extra((none,), budget - num_stages, is_auto=True, most_bytes=most_bytes)
    try:
        if Path(text).is_file():
            choices = (none, *slack_choices(Path(text), num_stages))
            return Extra(choices, max(sum(slack) for _, slack in choices))
        slack = parse_slack(text, num_stages)
    except ValueError as error:
        raise ConfigError(f"--paci-extra-in-flight {error}; or auto, or the metrics file of a run with auto.") from None
    return Extra(((0, slack),), sum(slack))


def memory_budget(text: str | None) -> tuple[int | None, int | None]:
    """What ``--paci-memory-budget`` says: micro-batches, or bytes; ``ConfigError`` if neither."""
    if text is None:
        return None, None
    if text.isdecimal() and int(text) > 0:
        return int(text), None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    size = 0
    if found:
        number, prefix, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size < 1:
        raise ConfigError(
            f"--paci-memory-budget {text}: must be a number of micro-batches, or of bytes, like 12GB or 12GiB."
        )
    return None, size


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


def _check_look_ahead(args: argparse.Namespace) -> None:
    """``ConfigError`` if ``--paci-look-ahead`` meets what has no main parameters to look ahead from."""
    if not (args.paci_look_ahead and args.pipeline_schedule != "1f1b"):
        return
    scalar = getattr(args, "muon_scalar_optimizer", "adam") if args.optimizer == "muon" else "adam"
    if args.optimizer not in ("adam", "muon") or scalar != "adam":
        name = f"--optimizer {args.optimizer}" if scalar == "adam" else f"--muon-scalar-optimizer {scalar}"
        raise ConfigError(
            f"--paci-look-ahead with {name}: how far it moves the weights is known of Adam and Muon. Use one of the two "
            "(with --muon-scalar-optimizer adam), or remove the flag."
        )
    if not (args.bf16 or args.fp16):
        raise ConfigError(
            "--paci-look-ahead in fp32: the model's weights are the optimizer's own there, and a look-ahead would need a "
            "copy of them. Add --bf16, or remove the flag."
        )
    for flag, why in (
        ("use_precision_aware_optimizer", "the optimizer itself then writes the model's weights"),
        ("reuse_grad_buf_for_mxfp8_param_ag", "new weights are then gathered in the gradients' memory, which it needs"),
    ):
        if getattr(args, flag, False):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError(f"--paci-look-ahead with {name}: {why}. Remove one of the two.")
