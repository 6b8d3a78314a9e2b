"""After which iterations the pipeline runs empty: where Megatron needs it, foretold from its arguments, and on request."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core import num_microbatches_calculator

from paci_megatron.runtime.control import Record

SPIKE_WINDOW = 100
SPIKE_AFTER = 20
SPIKE_DEVIATIONS = 6.0


def _divides(interval: int | None, iteration: int) -> bool:
    return bool(interval) and iteration % int(interval or 1) == 0


class Drains:
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
        self._flushing: range = range(0)
        self._spikes = SpikeDetector()

    def is_drain(self, iteration: int) -> bool:
        """Whether the pipeline is empty after ``iteration`` (``megatron.training.training.train`` names each
        reason)."""
        n, args = iteration, self._args
        return (
            n >= args.train_iters
            or n <= args.paci_start_iteration
            or n in self._requested
            or n in self._flushing
            or _divides(self._drain_interval, n)
            or self._evaluates(n)
            or (bool(args.save) and (_divides(args.save_interval, n) or _divides(args.non_persistent_save_interval, n)))
            or _divides(args.exit_interval, n)
            or n in (args.phase_transition_iterations or ())
            or (n + 1) in (args.iterations_to_skip or ())
            or _divides(args.check_weight_hash_across_dp_replicas_interval, n)
            or _divides(args.gpu_sniff_test_interval, n)
            or (args.adlr_autoresume and _divides(args.adlr_autoresume_interval, n))
            # Megatron then changes the time-out of all process groups, behind a barrier.
            or (args.distributed_timeout_seconds_after_init is not None and n == self._first_iteration)
            or (args.step_batch_size_schedule is not None and self._changes_microbatches(n))
        )

    def request(self, iterations: Iterable[int]) -> None:
        """Drain after these too."""
        self._requested.update(iterations)

    def leaves_flush(self, iteration: int) -> bool:
        """Whether the stages were kept together up to ``iteration`` and are not from there on."""
        kept = iteration == self._args.paci_start_iteration or (bool(self._flushing) and iteration == self._flushing[-1])
        return kept and iteration < self._args.train_iters

    def hear(self, iteration: int, total: Record, known_at: int) -> str | None:
        """Take what all stages said about ``iteration``, which every stage knows by ``known_at``; in order, once each.

        Whoever wants to stop gets a drain after the iteration that follows ``known_at``: no stage has then gone beyond it.
        With ``--paci-fallback`` the stages flush from there on if training goes wrong; returns the line that says so.
        Every rank decides alike, since all hear the same.
        """
        if total.exits:
            self._requested.add(known_at + 1)
        if not self._args.paci_fallback:
            return None
        jumps = self._spikes.is_spike(total.loss)
        if (total.is_finite and not jumps) or known_at + 1 in self._flushing:
            return None
        self._flushing = range(known_at + 1, known_at + self._args.paci_fallback + 2)
        reason = "the loss jumps" if total.is_finite else "gradients are not finite"
        return (
            f"iteration {iteration}: {reason}; flushing as 1f1b from iteration {known_at + 2}, for "
            f"{self._args.paci_fallback} iterations"
        )

    def to_save(self) -> dict[str, Any]:
        """What a checkpoint must have for a resumed run to decide as one that never stopped."""
        return {"losses": self._spikes.to_save(), "flushing": (self._flushing.start, self._flushing.stop)}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from :meth:`to_save`."""
        self._spikes = SpikeDetector(saved["losses"])
        self._flushing = range(*saved["flushing"])

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


def can_exit(args: argparse.Namespace) -> bool:
    """Whether this run's arguments let anything but its end stop it."""
    return bool(args.exit_signal_handler or args.exit_duration_in_mins)


def exit_wanted() -> bool:
    """Whether this rank has had the signal of ``--exit-signal-handler``, or ``--exit-duration-in-mins`` are over."""
    from megatron.training import get_args, get_signal_handler, training

    args = get_args()
    # The handler's own method asks all ranks.
    if args.exit_signal_handler and get_signal_handler()._signal_received:
        return True
    minutes = args.exit_duration_in_mins
    return bool(minutes) and time.time() - training._TRAIN_START_TIME > 60 * minutes


class SpikeDetector:
    """Tells a loss that jumps: more than 6 standard deviations above the mean of the 100 before it, or not finite."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """``losses`` are those remembered before a checkpoint."""
        self._losses = deque(losses, maxlen=SPIKE_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` jumps; it is remembered if it does not. The first 20 only count if they are not finite."""
        if not math.isfinite(loss):
            return True
        if len(self._losses) >= SPIKE_AFTER:
            spread = max(statistics.pstdev(self._losses), 1e-3)
            if loss > statistics.fmean(self._losses) + SPIKE_DEVIATIONS * spread:
                return True
        self._losses.append(loss)
        return False

    def to_save(self) -> list[float]:
        """What is remembered, for a checkpoint."""
        return list(self._losses)
