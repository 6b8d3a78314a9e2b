"""Checks a training command without starting it: every flag against torchrun's parser, the installed Megatron's and PACI's.

Runs what the training itself would run first: the parsers, Megatron's validation for the world size that the launcher is
asked for, the model's configuration, and PACI's own checks. It builds no model, starts no process, reads no data, and
needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from paci_megatron.config import ConfigError, PaciConfig
from paci_megatron.schedule.schedules import speedup_limit

from .batch_growth import calculator, growth_warning
from .describe import describe
from .early import check_early
from .inputs import megatrons_refusals
from .log import PREFIX

LAUNCHER = "torch.distributed.run"
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def check_command(command: list[str]) -> list[str]:
    """What the training would run as, in one line, and after it the plugin's own lines; ``ConfigError`` with every reason if
    it cannot run.

    The plugin must be installed (:func:`paci_megatron.install`).
    """
    script, flags, world_size = _launch(command)
    check_early(flags, world_size, on_this_machine=False)
    variables = dict(word.split("=", 1) for word in command if re.match(r"[A-Z_]\w*=", word))
    with _as_first_process(script, flags, world_size, variables), _output_captured() as output:
        args = _validated()
        summary = _summary(args)
        notes = _notes(args)
        if _CONNECTIONS not in variables and max(args.tensor_model_parallel_size, args.context_parallel_size) > 1:
            notes.append(f"Megatron demands {_CONNECTIONS}=1 in the job's environment with these flags")
    lines = [line.removeprefix(PREFIX).strip() for line in output.getvalue().splitlines() if line.startswith(PREFIX)]
    return [summary, *notes, *lines]


def default_kernels() -> list[str]:
    """What layers, attention and optimizer this machine would use with Megatron's defaults, and which fusions are off.

    The plugin must be installed.
    """
    from megatron.training.arguments import parse_args

    from paci_megatron.platform import cpu
    from paci_megatron.platform.without_te import adapt_to_installed

    with _as_first_process("pretrain_gpt_paci.py", [], 1, {}), _output_captured():
        args = parse_args()
        if cpu.is_active():
            cpu.adapt_arguments(args)
        return adapt_to_installed(args)


def check_without_megatron(command: list[str]) -> None:
    """``ConfigError`` for what can be said without importing Megatron or torch."""
    check_early(command[_launcher(command) + 1 :], None, on_this_machine=False)


def _launcher(command: list[str]) -> int:
    """The place of torchrun in a command."""
    at = next((i for i, word in enumerate(command) if word == LAUNCHER or Path(word).name == "torchrun"), None)
    if at is None:
        raise ConfigError(
            f"{shlex.join(command[:3])} ...: not a torchrun command. Write it with torchrun or -m {LAUNCHER}, and the "
            "numbers of nodes and of processes on each."
        )
    return at


def _launch(command: list[str]) -> tuple[str, list[str], int]:
    """The script, its arguments and the number of processes of a torchrun command, whatever stands before it."""
    from torch.distributed.run import get_args_parser, parse_min_max_nnodes

    with _output_captured():
        launch = get_args_parser().parse_args(command[_launcher(command) + 1 :])
    if not launch.nproc_per_node.isdecimal():
        raise ConfigError(f"--nproc-per-node {launch.nproc_per_node}: the number is not known here. Write it out.")
    if not re.fullmatch(r"\d+(:\d+)?", launch.nnodes):
        raise ConfigError(f"--nnodes {launch.nnodes}: the number is not known here. Write it out.")
    script, flags = launch.training_script, launch.training_script_args
    if launch.module and script == "paci_megatron":  # the script is its first argument
        if not flags:
            raise ConfigError("-m paci_megatron: name the training script after it.")
        script, *flags = flags
    return script, flags, int(launch.nproc_per_node) * parse_min_max_nnodes(launch.nnodes)[1]


@contextlib.contextmanager
def _as_first_process(script: str, flags: list[str], world_size: int, variables: dict[str, str]) -> Iterator[None]:
    """Inside, this process looks to Megatron like the first of ``world_size``, with these environment variables."""
    environment, argv = dict(os.environ), sys.argv
    first = {"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update({_CONNECTIONS: "1", **variables, **first})
    sys.argv = [script, *flags]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = argv


@contextlib.contextmanager
def _output_captured() -> Iterator[io.StringIO]:
    """What the body prints; ``ConfigError`` when it ends the process, as parsers do, or Megatron refuses."""
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors), megatrons_refusals():
            yield printed
    except SystemExit as end:
        raise ConfigError(_reason(errors.getvalue()) or _reason(printed.getvalue()) or f"exit status {end.code}") from end


def _reason(text: str) -> str:
    """What was refused: our own reasons, all of them, or a parser's last line; argparse prints a thousand flags first."""
    ours = text.rpartition(f"{PREFIX} error: ")
    return ours[2].strip() if ours[1] else text.strip().rpartition("\n")[2].rpartition("error: ")[2]


def _validated() -> argparse.Namespace:
    """The arguments of ``sys.argv`` after everything that Megatron and PACI check before they build something."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args()
    args.paci_only_checked = True
    # As pretrain_gpt_paci.py does.
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    core_transformer_config_from_args(args)
    if args.step_batch_size_schedule is not None:
        args.num_microbatches = calculator(args).get()
    else:
        sizes = (args.global_batch_size, args.micro_batch_size, args.data_parallel_size)
        args.num_microbatches = ConstantNumMicroBatchesCalculator(*sizes, False, args.rank).get()
    return args


def _summary(args: argparse.Namespace) -> str:
    parts = [f"schedule {args.pipeline_schedule}", f"{args.pipeline_model_parallel_size} stages"]
    layers = _layers_by_stage(args)
    if layers is not None:
        parts[-1] += f" of {' '.join(map(str, layers))} layers"
    if args.data_parallel_size > 1:
        parts.append(f"{args.data_parallel_size} pipelines")
    count = getattr(args, "num_microbatches", None)
    if count is not None:
        begin = "" if args.step_batch_size_schedule is None else " at the beginning"
        parts.append(f"{count} micro-batches of {args.micro_batch_size} sequences per update{begin}")
    if args.train_iters and args.step_batch_size_schedule is None:
        tokens = args.train_iters * args.global_batch_size * args.seq_length
        parts.append(f"{args.train_iters} updates, {tokens:.3g} tokens")
    return ", ".join(parts)


def _notes(args: argparse.Namespace) -> list[str]:
    """What PACI will do: drift, memory, clipping, and what there is to gain."""
    count = getattr(args, "num_microbatches", None)
    if count is None or args.pipeline_schedule == "1f1b":
        return []
    config = PaciConfig.from_args(args)
    limit = speedup_limit(config.num_processes, count)
    said = [*describe(config, args.clip_grad, count), *growth_warning(config, args)]
    return [*said, f"speed: at most {limit:.2f} times that of 1F1B-flush"]


def _layers_by_stage(args: argparse.Namespace) -> list[int] | None:
    """Transformer layers of each stage if a layout gives them, else None."""
    if args.pipeline_model_parallel_layout is None:
        return None
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout)
    return [stage.count(LayerType.decoder) for stage in stages]
