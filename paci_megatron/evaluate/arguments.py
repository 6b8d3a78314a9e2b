"""The arguments of an evaluation: Megatron's command line, completed by the checkpoint's, and checked."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from paci_megatron.config import ConfigError
from paci_megatron.data.indexed import open_index
from paci_megatron.data.training_data import check_tokenizer_files

from .checkpoint_args import adopt, check_checkpoint

MICRO_BATCH_SIZE = 4


def evaluation_arguments(
    argv: Sequence[str], prefixes: Sequence[str], needs_tokenizer: bool
) -> tuple[argparse.Namespace, int]:
    """Megatron's validated arguments, those of the model from the checkpoint, and the checkpoint's iteration.

    ``prefixes`` of ``.bin/.idx`` to evaluate on are checked with them, and the tokenizer's files if it is needed.
    ``ConfigError`` for what cannot work.
    """
    from megatron.training.arguments import parse_args, validate_args

    saved, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        args = parse_args(_with_one_line)
    finally:
        sys.argv = saved
    check_checkpoint(args.load, args.ckpt_step)
    _check_flags(args)
    iteration = adopt(args, _given(argv))
    if args.micro_batch_size is None:
        args.micro_batch_size = MICRO_BATCH_SIZE
    # Of the checkpoint the weights and nothing else.
    args.finetune = args.no_load_optim = args.no_load_rng = args.skip_train = True
    args.rerun_mode = "disabled"
    _check_model(args)
    if needs_tokenizer:
        check_tokenizer_files(args)
    for prefix in prefixes:
        open_index(prefix)
    validate_args(args)
    return args, iteration


def _given(argv: Sequence[str]) -> set[str]:
    """The names of the arguments that are on the command line."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(list(argv))))


def _with_one_line(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """An error would show the usage of all of Megatron's flags, and end the program."""
    parser.error = _refuse  # type: ignore[method-assign]
    return parser


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"{message} (see --help)")


def _check_flags(args: argparse.Namespace) -> None:
    """``ConfigError`` for flags that have no place here, or that do not fit the number of processes."""
    for flag, value, remedy in (
        ("--context-parallel-size", args.context_parallel_size != 1, "Use --tensor-model-parallel-size"),
        ("--num-layers-per-virtual-pipeline-stage", args.num_layers_per_virtual_pipeline_stage, "Remove it"),
        ("--num-virtual-stages-per-pipeline-rank", args.num_virtual_stages_per_pipeline_rank, "Remove it"),
        ("--paci-emulate-stages", args.paci_emulate_stages, "Remove it: any checkpoint loads in one process"),
        ("--pipeline-schedule paci", args.pipeline_schedule != "1f1b", "Remove it: PACI is a way to train"),
        ("--fp16", args.fp16, "Use --bf16, or neither for fp32"),
    ):
        if value:
            raise ConfigError(f"{flag} is not for evaluation. {remedy}.")
    tensor, pipeline, world = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.world_size
    if world % (tensor * pipeline):
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor} --pipeline-model-parallel-size {pipeline}: needs a multiple of "
            f"{tensor * pipeline} processes, and there are {world}. Start as many with torchrun --nproc-per-node."
        )
    if args.micro_batch_size is not None and args.micro_batch_size < 1:
        raise ConfigError(f"--micro-batch-size {args.micro_batch_size}: must be at least 1.")


def _check_model(args: argparse.Namespace) -> None:
    """``ConfigError`` if the checkpoint's model cannot be evaluated as the command line says."""
    length, positions = args.seq_length, args.max_position_embeddings
    if not 1 <= length <= positions:
        remedy = "Give at most that"
        if args.position_embedding_type != "learned_absolute":
            remedy += f", or --max-position-embeddings {length} too"
        raise ConfigError(f"--seq-length {length}: must be from 1 to the model's {positions} positions. {remedy}.")
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for what, count in (("attention heads", args.num_attention_heads), ("rows of the vocabulary", args.padded_vocab_size)):
        if count is not None and count % tensor:
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor}: does not divide the model's {count} {what}. Change it."
            )
    placed = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
    )
    units = args.num_layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if all(value is None for value in placed) and units % pipeline:
        raise ConfigError(
            f"--pipeline-model-parallel-size {pipeline}: does not divide the model's {args.num_layers} layers. Change it, "
            "or say where the layers are, for example with --account-for-loss-in-pipeline-split."
        )
