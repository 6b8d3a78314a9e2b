"""What stands in Megatron's training loop at each patch point there: a factory takes the original and returns the
replacement. What stands there before training begins is in hooks.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from paci_megatron.runtime.control import Record

from . import flush_trace as tracing
from . import monitor as monitors
from . import run as contexts
from .train_step import train_step

Function = Callable[..., Any]

_evaluating: tuple[str, int] | None = None  # prefix and iteration of the evaluation in progress


def skipped_by_stage(original: Function) -> Function:
    """Wrap ``dummy_train_step``, which reads a skipped iteration's data."""

    @functools.wraps(original)
    def dummy_train_step(data_iterator: Any) -> None:
        context = contexts.current()
        if context is None:
            return original(data_iterator)
        context.require_drained("a skipped iteration")
        for stage in context.stages:
            iterator = context.iterator_of(stage, data_iterator)
            if iterator is not None or not context.config.emulates:
                with stage.active():
                    original(iterator)
        return None

    return dummy_train_step


def train_step_chosen(original: Function) -> Function:
    @functools.wraps(original)
    def chosen_train_step(*positional: Any, iteration: int, **named: Any) -> Any:
        monitor = monitors.current()
        step: Function = train_step if contexts.runs_plans() else original
        if monitor is None:
            return step(*positional, iteration=iteration, **named)
        monitor.begin_iteration()
        flush_trace = tracing.current()
        if flush_trace is not None:
            flush_trace.begin_iteration(iteration)
        result = step(*positional, iteration=iteration, **named)
        if not contexts.runs_plans():  # the executor counts its own updates
            for meter in monitor.meters:
                meter.count_update(successful=not result[1])
        if flush_trace is not None:
            flush_trace.end_iteration(iteration + 1)
        context = contexts.current()
        if context is not None:
            totals = context.take_totals()
        else:
            totals = {iteration + 1: Record(squared_norm=result[5] ** 2)} if result[5] is not None else {}
        monitor.end_iteration(iteration + 1, losses=result[0], totals=totals)
        return result

    return chosen_train_step


def metered(original: Function) -> Function:
    """Count the time inside as the stage's computing, for the measured bubble and the trace of Megatron's own schedule."""

    @functools.wraps(original)
    def metered_function(*positional: Any, **named: Any) -> Any:
        monitor = monitors.current()
        if monitor is None or contexts.runs_plans():  # the executor meters itself
            return original(*positional, **named)
        flush_trace = tracing.current()
        traced = flush_trace.performing(original.__name__) if flush_trace is not None else contextlib.nullcontext()
        with monitor.meters[0].computing(), traced:
            return original(*positional, **named)

    return metered_function


def training_log_recorded(original: Function) -> Function:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        bound = signature.bind(*positional, **named)
        iteration = bound.arguments["iteration"]
        if contexts.runs_plans() and not _is_written(get_args(), iteration) and not bound.arguments["skipped_iter"]:
            _add_up_losses(bound.arguments["total_loss_dict"], bound.arguments["loss_dict"])
            bound.arguments["loss_dict"] = {}
        result = original(*bound.args, **bound.kwargs)
        monitor = monitors.current()
        if monitor is not None and (iteration % get_args().log_interval == 0 or iteration == 1):
            monitor.log_interval(iteration)
        return result

    return training_log


def memory_of_schedule_reported(original: Function) -> Function:
    """Wrap ``report_theoretical_memory``, which takes the micro-batches between two drains and counts up to N in flight.

    What ``--paci-extra-in-flight`` adds to N is not in Megatron's formula.
    """

    @functools.wraps(original)
    def report_theoretical_memory(args: Any, num_microbatches: int, verbose: bool = False) -> Any:
        context = contexts.current()
        if context is not None:
            config = context.config
            if config.schedule == "paci":
                num_microbatches *= config.drain_interval or config.num_stages
            if config.emulates:  # the estimate is for one stage, as if each had its own processes
                args = argparse.Namespace(**vars(args) | {"world_size": args.world_size * config.num_stages})
        return original(args, num_microbatches=num_microbatches, verbose=verbose)

    return report_theoretical_memory


def _is_written(args: Any, iteration: int) -> bool:
    """Whether Megatron writes this iteration's losses to TensorBoard or Weights & Biases, and so waits for them."""
    from megatron.training import get_tensorboard_writer

    return get_tensorboard_writer() is not None and iteration % args.tensorboard_log_interval == 0


def _add_up_losses(totals: dict[str, Any], losses: dict[str, torch.Tensor]) -> None:
    """What Megatron does for its log line, without the zero that it copies to the device each time: a wait."""
    for name, loss in losses.items():
        totals[name] = totals.get(name, 0.0) + loss.view(-1)


def evaluation_recorded(original: Function) -> Function:
    """Wrap ``evaluate_and_print_results``: the pipeline must be empty, and training time stands still."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_and_print_results(*positional: Any, **named: Any) -> Any:
        global _evaluating
        arguments = signature.bind(*positional, **named).arguments
        _evaluating = (arguments["prefix"], arguments["iteration"])
        with _paused("an evaluation"):
            return original(*positional, **named)

    return evaluate_and_print_results


def evaluation_result_recorded(original: Function) -> Function:
    @functools.wraps(original)
    def evaluate(*positional: Any, **named: Any) -> Any:
        result = original(*positional, **named)
        monitor = monitors.current()
        if monitor is not None and _evaluating is not None and result[0] is not None:
            monitor.evaluated(*_evaluating, losses=result[0])
        return result

    return evaluate


def exit_decided_when_drained(original: Function) -> Function:
    """Wrap ``checkpoint_and_decide_exit``, which asks all ranks in every iteration whether to stop."""

    @functools.wraps(original)
    def checkpoint_and_decide_exit(*positional: Any, **named: Any) -> bool:
        from megatron.training import get_args

        context = contexts.current()
        if context is None or context.is_drained():
            return bool(original(*positional, **named))
        # Who wants to stop says so in the records, and the pipeline drains soon.
        args = get_args()
        asked = args.exit_signal_handler, args.exit_duration_in_mins
        args.exit_signal_handler, args.exit_duration_in_mins = False, None
        exits = bool(original(*positional, **named))
        args.exit_signal_handler, args.exit_duration_in_mins = asked
        return exits

    return checkpoint_and_decide_exit


def save_when_drained(original: Function) -> Function:
    @functools.wraps(original)
    def save_checkpoint_and_time(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        context = contexts.current()
        # Saved with all arguments. Flush leaves none, and must not hand on that of a checkpoint it began with.
        get_args().paci_state = context.state_to_save() if context is not None else None
        with _paused("a checkpoint"):
            return original(*positional, **named)

    return save_checkpoint_and_time


@contextlib.contextmanager
def _paused(purpose: str) -> Iterator[None]:
    """Training stands still inside, with the pipeline empty."""
    context = contexts.current()
    if context is not None:
        context.require_drained(purpose)
    monitor = monitors.current()
    if monitor is None:
        yield
        return
    monitor.pause()
    yield
    monitor.resume()


def async_save_finalized_when_drained(original: Function) -> Function:
    @functools.wraps(original)
    def maybe_finalize_async_save(*positional: Any, **named: Any) -> Any:
        context = contexts.current()
        # It agrees with all ranks whether the save is complete; until a drain it can wait.
        if context is None or context.is_drained():
            return original(*positional, **named)
        return None

    return maybe_finalize_async_save


def kept_within_stage(original: Function) -> Function:
    """Wrap a reduction over all stages whose value every stage already has: the learning rate of the log line."""

    @functools.wraps(original)
    def reduce_max_stat_across_model_parallel_group(stat: Any, *positional: Any, **named: Any) -> Any:
        return stat if contexts.runs_plans() else original(stat, *positional, **named)

    return reduce_max_stat_across_model_parallel_group
