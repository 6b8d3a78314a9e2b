"""The iterations after which Megatron needs an empty pipeline, foretold from its arguments."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

from megatron.core import num_microbatches_calculator


def _divides(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


class Boundaries:
    """Says whether the pipeline drains after an iteration. Every rank gives the same answers, as far ahead as asked.

    Iterations count from 1 here, as in Megatron's log: ``n`` is the value after Megatron's increment.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        drain_interval: int | None,
        microbatches_after: Callable[[int], int],
    ) -> None:
        """``microbatches_after(n)`` is the number of micro-batches of iteration n+1."""
        self._args = args
        self._drain_interval = drain_interval
        self._microbatches_after = microbatches_after
        self._first_iteration = args.iteration + 1
        self._requested: set[int] = set()
        self.flushing: range = range(0)

    def drain_at(self, iteration: int) -> None:
        """Drain after ``iteration`` too. Every stage must hear of it before a micro-batch beyond it enters."""
        self._requested.add(iteration)

    def fall_back_at(self, iteration: int) -> bool:
        """Drain after ``iteration``, and after each of the ``--paci-fallback`` next ones. False if that is so already."""
        if iteration in self.flushing:
            return False
        self.flushing = range(iteration, iteration + self._args.paci_fallback + 1)
        return True

    def leaves_flush(self, iteration: int) -> bool:
        """Whether the stages were kept together up to ``iteration`` and are not from there on."""
        kept = iteration == self._args.paci_start_iteration or (bool(self.flushing) and iteration == self.flushing[-1])
        return kept and iteration < self._args.train_iters

    def is_drain(self, iteration: int) -> bool:
        """Whether the pipeline is empty after ``iteration`` (``megatron.training.training.train`` names each
        reason)."""
        n, args = iteration, self._args
        return (
            n >= args.train_iters
            or n <= args.paci_start_iteration
            or n in self._requested
            or n in self.flushing
            or _divides(self._drain_interval, n)
            or self._evaluates(n)
            or (bool(args.save) and (_divides(args.save_interval, n) or _divides(args.non_persistent_save_interval, n)))
            or _divides(args.exit_interval, n)
            or n in (args.phase_transition_iterations or ())
            or (n + 1) in (args.iterations_to_skip or ())
            or _divides(args.check_weight_hash_across_dp_replicas_interval, n)
            or _divides(args.gpu_sniff_test_interval, n)
            # Megatron then changes the time-out of all process groups, behind a barrier.
            or (args.distributed_timeout_seconds_after_init is not None and n == self._first_iteration)
            or (args.step_batch_size_schedule is not None and self._changes_microbatches(n))
        )

    def _evaluates(self, n: int) -> bool:
        args = self._args
        # do_valid is set when the data sets are built; until then assume there will be evaluations.
        wanted = getattr(args, "do_valid", True)
        started = args.start_eval_at_iter is None or n >= args.start_eval_at_iter
        return bool(wanted and started and _divides(args.eval_interval, n))

    def _changes_microbatches(self, n: int) -> bool:
        return self._microbatches_after(n) != self._microbatches_after(n - 1)


class MicrobatchForecast:
    """Foretells the number of micro-batches of each iteration by running Megatron's calculator ahead on a copy."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._calculator = copy.copy(num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
        self._start: int = args.iteration
        self._consumed: int = args.consumed_train_samples
        self._counts: list[int] = []

    def __call__(self, n: int) -> int:
        """The number of micro-batches of iteration ``n + 1``, for n from the iteration training starts after."""
        while len(self._counts) <= n - self._start:
            self._calculator.update(self._consumed, consistency_check=False, verbose=False)
            self._counts.append(self._calculator.get())
            self._consumed += self._calculator.get_current_running_global_batch_size()
        return self._counts[n - self._start]
