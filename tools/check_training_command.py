"""Checks training commands without starting them: every flag against torchrun's parser, the installed Megatron's and PACI.

    check_training_command.py torchrun --nproc-per-node 8 pretrain_gpt_paci.py --pipeline-schedule paci ...
    check_training_command.py < file with one command per line

Runs what the training itself would run first: the parsers, Megatron's validation for the world size that the launcher is
asked for, the model's configuration, and PACI's own checks. It builds no model, starts no process, reads no data, and
needs no GPU; where there is none, what depends on the GPU is checked for a CPU instead, and a line says so. For each
command it prints one line that begins with "ok: " or "error: ". Exit status 2 if any is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

# A checkout that is not installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paci_megatron import ConfigError, PaciConfig, install
from paci_megatron.schedule.schedules import max_drift

LAUNCHER = "torch.distributed.run"


def check_command(command: list[str]) -> list[str]:
    """What the training would run as, in one line, and after it the plugin's own lines; ``ConfigError`` if it cannot run.

    The plugin must be installed (:func:`paci_megatron.install`).
    """
    script, flags, world_size = _launch(command)
    if not Path(script).is_file():
        raise ConfigError(f"{script}: no such file. Name the training script after torchrun's options.")
    with _as_first_process(script, flags, world_size), _output_captured() as output:
        args = _validated()
        summary = _summary(args)
    notes = [line for line in output.getvalue().splitlines() if line.startswith("paci-megatron: ")]
    return [summary, *notes]


def _launch(command: list[str]) -> tuple[str, list[str], int]:
    """The script, its arguments and the number of processes of a torchrun command."""
    from torch.distributed.run import get_args_parser, parse_min_max_nnodes

    if LAUNCHER in command:
        options = command[command.index(LAUNCHER) + 1 :]
    elif command and Path(command[0]).name == "torchrun":
        options = command[1:]
    else:
        raise ConfigError(f"{shlex.join(command[:3])} ...: not a torchrun command. Begin it with torchrun or -m {LAUNCHER}.")
    with _output_captured():
        launch = get_args_parser().parse_args(options)
    if not launch.nproc_per_node.isdecimal():
        raise ConfigError(f"--nproc-per-node {launch.nproc_per_node}: the number is not known here. Write it out.")
    nodes = parse_min_max_nnodes(launch.nnodes)[1]
    return launch.training_script, launch.training_script_args, int(launch.nproc_per_node) * nodes


@contextlib.contextmanager
def _as_first_process(script: str, flags: list[str], world_size: int) -> Iterator[None]:
    """Inside, this process looks to Megatron like the first of ``world_size``."""
    environment, argv = dict(os.environ), sys.argv
    os.environ.update({"WORLD_SIZE": str(world_size), "RANK": "0", "LOCAL_RANK": "0"})
    sys.argv = [script, *flags]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = argv


@contextlib.contextmanager
def _output_captured() -> Iterator[io.StringIO]:
    """What the body prints; when it ends the process or fails an assertion, as parsers and Megatron do, ``ConfigError``."""
    printed, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            yield printed
    except SystemExit as end:
        # argparse prints all of Megatron's thousand flags first.
        last = (errors.getvalue().strip() or printed.getvalue().strip() or f"exit status {end.code}").splitlines()[-1]
        raise ConfigError(last.rpartition("error: ")[2]) from end
    except ConfigError:
        raise
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        # Many of Megatron's assertions have no message but the condition itself.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        raise ConfigError(f"refused by Megatron: {' '.join(reason.split())}") from error


def _validated() -> argparse.Namespace:
    """The arguments of ``sys.argv`` after everything that Megatron and PACI check before they build something."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args()
    # As pretrain_gpt_paci.py does.
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    core_transformer_config_from_args(args)
    if args.step_batch_size_schedule is None:
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
        parts.append(f"{count} micro-batches of {args.micro_batch_size} sequences per update")
    if count is not None and args.pipeline_schedule == "paci":
        num_stages = PaciConfig.from_args(args).num_stages
        parts.append(f"drift of at most {max_drift(0, num_stages, count)}")
    if args.train_iters and args.step_batch_size_schedule is None:
        tokens = args.train_iters * args.global_batch_size * args.seq_length
        parts.append(f"{args.train_iters} updates, {tokens:.3g} tokens")
    return ", ".join(parts)


def _layers_by_stage(args: argparse.Namespace) -> list[int] | None:
    """Transformer layers of each stage if a layout gives them, else None."""
    if args.pipeline_model_parallel_layout is None:
        return None
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = PipelineParallelLayerLayout.parse_str_to_list(args.pipeline_model_parallel_layout)
    return [stage.count(LayerType.decoder) for stage in stages]


def main(argv: list[str]) -> int:
    """Check the command given, or each line of standard input; 0 if all can run, else 2."""
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    commands = [argv] if argv else [shlex.split(line) for line in sys.stdin if line.strip()]
    if not commands:
        print("check_training_command.py: error: no command given (see --help)", file=sys.stderr)
        return 2
    logging.disable(logging.WARNING)  # the answer is one line for each command
    with contextlib.redirect_stderr(io.StringIO()):  # what optional packages say about themselves
        install()
    failed = False
    said: set[str] = set()
    for command in commands:
        try:
            summary, *notes = check_command(command)
        except ConfigError as error:
            failed = True
            print(f"error: {error}", flush=True)
            continue
        print(f"ok: {summary}", *(note for note in notes if note not in said), sep="\n  ", flush=True)
        said.update(notes)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
