"""A batch that grows during training is smallest, and drift largest, just when updates change the weights most."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from paci_megatron.config import PaciConfig
from paci_megatron.schedule.plan import Plan

if TYPE_CHECKING:
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator


def calculator(args: argparse.Namespace) -> StepBatchsizeNumMicroBatchesCalculator:
    """Megatron's, of ``--step-batch-size-schedule``, at the beginning."""
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

    return StepBatchsizeNumMicroBatchesCalculator(
        args.micro_batch_size,
        args.data_parallel_size * args.gtp_weight_remat_size,
        args.decrease_batch_size_if_needed,
        rank=-1,  # says nothing
        schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )


def growth_warning(config: PaciConfig, args: argparse.Namespace) -> list[str]:
    """A line if drift is larger while the batch is still small: until which iteration, and what to do. Otherwise nothing."""
    if args.step_batch_size_schedule is None or config.schedule == "1f1b":
        return []
    sizes = calculator(args)

    def counts_and_drift(batch_size: int) -> tuple[int, int]:
        a = max(batch_size // sizes.micro_batch_times_data_parallel_size, 1)
        return a, Plan(config.schedule, config.num_stages, a, config.slack).max_drift(0)

    first_a, first_drift = counts_and_drift(sizes.schedule[0][1])
    last_a, last_drift = counts_and_drift(sizes.schedule[-1][1])
    iteration = consumed = 0
    for (_, batch_size), (threshold, _) in zip(sizes.schedule, sizes.schedule[1:], strict=False):
        if counts_and_drift(batch_size)[1] <= last_drift:
            break
        updates = max(-(-(threshold - consumed) // batch_size), 0)
        iteration, consumed = iteration + updates, consumed + updates * batch_size
    begin = min(iteration, args.train_iters or iteration)
    if first_drift <= last_drift or begin <= args.paci_start_iteration:
        return []
    share = f", {begin / args.train_iters:.1%} of the iterations" if args.train_iters else ""
    return [
        f"drift is largest at the beginning, where updates change the weights most: up to {first_drift} updates with "
        f"{first_a} micro-batches, and {last_drift} from iteration {begin + 1} on with {last_a}. If the loss falls behind, "
        f"flush until then with --paci-start-iteration {begin}{share}, or begin with a larger batch"
    ]
