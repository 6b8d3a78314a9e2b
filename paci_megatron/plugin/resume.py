"""What changes for PACI when a run resumes from a checkpoint."""

from __future__ import annotations

import argparse

from megatron.core.num_microbatches_calculator import _build_num_microbatches_calculator


def resume_line(saved: argparse.Namespace, args: argparse.Namespace) -> str | None:
    """One line if the run resumes under another schedule, or paci with another number of micro-batches per update.

    ``saved`` are the arguments in the checkpoint. A checkpoint is always written with an empty pipeline, so any change is
    allowed; it is worth knowing because it changes the drift.
    """
    consumed = getattr(saved, "consumed_train_samples", 0)
    before, now = _schedule(saved), _schedule(args)
    a_before, a_now = (_microbatches_per_update(a, consumed) for a in (saved, args))
    if (before, a_before) == (now, a_now) or "paci" not in (before, now):
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
