"""What changes when a run resumes from a checkpoint: said where it is allowed, refused with the remedy where not."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator

from paci_megatron.config import ConfigError

from .inputs import exit_on_config_error

Function = Callable[..., Any]


def resume_line(saved: argparse.Namespace, args: argparse.Namespace) -> str | None:
    """One line if the run resumes under another schedule, or paci with another number of micro-batches per update.

    ``saved`` are the arguments in the checkpoint. A checkpoint is always written with an empty pipeline, so any change is
    allowed; it is worth knowing because it changes the drift.
    """
    consumed = getattr(saved, "consumed_train_samples", 0)
    before, now = _schedule(saved), _schedule(args)
    a_before, a_now = (_microbatches_per_update(a, consumed) for a in (saved, args))
    if (before, a_before) == (now, a_now) or before == now == "1f1b":
        return None
    return (
        f"resuming a checkpoint written under {before}, {a_before or 'an unknown number of'} micro-batches per update, "
        f"with {now}, {a_now} micro-batches per update"
    )


def _schedule(args: argparse.Namespace) -> str:
    return str(getattr(args, "pipeline_schedule", "1f1b"))  # not there if Megatron saved it without the plugin


def _microbatches_per_update(args: argparse.Namespace, consumed_samples: int) -> int | None:
    """By Megatron's own calculator after ``consumed_samples``; None if a checkpoint does not tell the batch size."""
    global_batch_size = getattr(args, "global_batch_size", None)
    if global_batch_size is None:
        return None
    calculator = _build_num_microbatches_calculator(
        rank=-1,  # only rank 0 logs
        global_batch_size=global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * getattr(args, "gtp_weight_remat_size", 1),
        decrease_batch_size_if_needed=getattr(args, "decrease_batch_size_if_needed", False),
        step_batch_size_schedule=getattr(args, "step_batch_size_schedule", None),
        seq_length=args.seq_length,
    )
    calculator.update(consumed_samples, consistency_check=False)
    return int(calculator.get())


def check_vocabulary(saved: argparse.Namespace, args: argparse.Namespace, vocab_size: int | None) -> None:
    """``ConfigError`` if the checkpoint's embedding is of another vocabulary; ``vocab_size`` is the tokenizer's, not padded.

    Megatron loads the rows that both have and leaves the others as they were drawn, since the padding may differ between
    runs of different tensor-parallel sizes.
    """
    padded, now = getattr(saved, "padded_vocab_size", None), getattr(args, "padded_vocab_size", None)
    if not padded or not now or padded == now:
        return
    multiple = saved.make_vocab_size_divisible_by * saved.tensor_model_parallel_size
    if vocab_size is not None and padded - multiple < vocab_size <= padded:
        return
    raise ConfigError(
        f"--load {args.load}: the checkpoint has a vocabulary of {padded} tokens with padding, the command line one of {now}"
        f"{f' (the tokenizer has {vocab_size})' if vocab_size else ''}. Give the tokenizer that it was trained with."
    )


def wrap_check_and_set(original: Function) -> Function:
    """Wrap ``OptimizerParamScheduler._check_and_set``, which refuses another schedule of the learning rate on resume."""

    @functools.wraps(original)
    def _check_and_set(self: Any, cls_value: Any, sd_value: Any, name: str) -> Any:
        try:
            return original(self, cls_value, sd_value, name)
        except AssertionError as error:
            with exit_on_config_error():
                raise ConfigError(
                    f"{name} is {cls_value} on the command line and {sd_value} in the checkpoint; it follows from the batch "
                    "size, the iterations and the --lr flags. Add --override-opt_param-scheduler to take the command "
                    "line's, or --use-checkpoint-opt_param-scheduler to keep the checkpoint's."
                ) from error
            raise  # not reached

    return _check_and_set


def wrap_load_checkpoint(original: Function) -> Function:
    """Wrap ``load_checkpoint``: where Megatron gives up with ``sys.exit()`` the job has not done what it was told."""

    @functools.wraps(original)
    def load_checkpoint(*positional: Any, **named: Any) -> Any:
        try:
            return original(*positional, **named)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            print("paci-megatron: error: the checkpoint could not be loaded; see above", file=sys.stderr, flush=True)
            sys.exit(2)

    return load_checkpoint
