"""What takes the place of the functions of Megatron's training loop: ``wrap_f`` takes Megatron's f and returns ours."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import local_multi_tensor_l2_norm

from paci_megatron.runtime.control import Record

from . import run as runs
from .run import Run
from .train_step import train_step

Function = Callable[..., Any]


def wrap_train_step(original: Function) -> Function:
    """Runs the plans up to the next update; Megatron's own train step is measured."""

    @functools.wraps(original)
    def chosen_train_step(forward_step_func: Any, data_iterator: Any, *positional: Any, iteration: int, **named: Any) -> Any:
        run = runs.current()
        if run is None:
            return original(forward_step_func, data_iterator, *positional, iteration=iteration, **named)
        run.monitor.begin_iteration()
        if run.runs_plans:
            result = train_step(run, forward_step_func, data_iterator, iteration)
            totals = run.totals
        else:
            with run.flush_trace.iteration(iteration) if run.flush_trace is not None else contextlib.nullcontext():
                result = original(forward_step_func, data_iterator, *positional, iteration=iteration, **named)
            run.meters[0].count_update(successful=not result[1])
            totals = {iteration + 1: Record(squared_norm=result[5] ** 2)} if result[5] is not None else {}
        run.monitor.end_iteration(iteration + 1, losses=result[0], totals=totals)
        return result

    return chosen_train_step


def wrap_optimizer_step(original: Function) -> Function:
    """Where plans are run the gradients are ready and clipped: only Megatron's step itself is left to do.

    Called where Megatron calls it, so that a wrapper that a user puts around it is called too.
    """

    @functools.wraps(original)
    def step(self: Any) -> Any:
        run = runs.current()
        if run is None or not run.runs_plans:
            return original(self)
        return self.step_with_ready_grads(), None, None

    return step


def wrap_get_loss_scale(original: Function) -> Function:
    """Megatron's loop reads it in every iteration; where plans are run it is on the host already."""

    @functools.wraps(original)
    def get_loss_scale(self: Any) -> Any:
        run = runs.current()
        return original(self) if run is None or run.loss_scale is None else run.loss_scale

    return get_loss_scale


def wrap_dummy_train_step(original: Function) -> Function:
    """Reads a skipped iteration's data, at each stage that has any."""

    @functools.wraps(original)
    def dummy_train_step(data_iterator: Any) -> None:
        run = runs.current()
        if run is None or not run.runs_plans:
            return original(data_iterator)
        run.require_drained("a skipped iteration")
        for stage in run.stages:
            iterator = run.iterator_of(stage, data_iterator)
            if iterator is not None or not run.holds_several:
                with stage.active():
                    original(iterator)
        return None

    return dummy_train_step


def wrap_computing(original: Function) -> Function:
    """Counts the time inside as the stage's computing, for the measured bubble and the trace of Megatron's own schedule."""

    @functools.wraps(original)
    def computing(*positional: Any, **named: Any) -> Any:
        run = runs.current()
        if run is None or run.runs_plans:  # the executor counts for itself
            return original(*positional, **named)
        traced = run.flush_trace.performing(original.__name__) if run.flush_trace is not None else contextlib.nullcontext()
        with run.meters[0].computing(), traced:
            return original(*positional, **named)

    return computing


def wrap_training_log(original: Function) -> Function:
    """Adds the plugin's line and the metrics file to Megatron's log line, and keeps it from waiting for the device."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        run = runs.current()
        if run is None:
            return original(*positional, **named)
        bound = signature.bind(*positional, **named)
        iteration = bound.arguments["iteration"]
        if run.runs_plans and not _is_written(get_args(), iteration) and not bound.arguments["skipped_iter"]:
            _add_up_losses(bound.arguments["total_loss_dict"], bound.arguments["loss_dict"])
            bound.arguments["loss_dict"] = {}
        result = original(*bound.args, **bound.kwargs)
        if iteration % get_args().log_interval == 0 or iteration == 1:
            run.monitor.log_interval(iteration)
        return result

    return training_log


def _is_written(args: Any, iteration: int) -> bool:
    """Whether Megatron writes this iteration's losses to TensorBoard or Weights & Biases, and so waits for them."""
    from megatron.training import get_tensorboard_writer

    return get_tensorboard_writer() is not None and iteration % args.tensorboard_log_interval == 0


def _add_up_losses(totals: dict[str, Any], losses: dict[str, torch.Tensor]) -> None:
    """What Megatron does for its log line, without the zero that it copies to the device each time: a wait."""
    for name, loss in losses.items():
        totals[name] = totals.get(name, 0.0) + loss.view(-1)


def wrap_report_theoretical_memory(original: Function) -> Function:
    """It takes the micro-batches between two drains and counts up to N in flight, a process for each stage.

    What ``--paci-extra-in-flight`` adds to N is not in Megatron's formula.
    """

    @functools.wraps(original)
    def report_theoretical_memory(args: Any, num_microbatches: int, verbose: bool = False) -> Any:
        run = runs.current()
        config = run.config if run is not None else None
        if config is not None:
            if config.schedule != "1f1b":
                num_microbatches *= config.drain_interval or config.num_stages
            # The estimate is for one stage, as if each had its own processes.
            args = argparse.Namespace(**vars(args) | {"world_size": args.world_size * config.stages_per_process})
        return original(args, num_microbatches=num_microbatches, verbose=verbose)

    return report_theoretical_memory


def wrap_evaluate_and_print_results(original: Function) -> Function:
    """The pipeline must be empty, and training time stands still."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluate_and_print_results(*positional: Any, **named: Any) -> Any:
        run = runs.current()
        if run is None:
            return original(*positional, **named)
        arguments = signature.bind(*positional, **named).arguments
        run.evaluating = (arguments["prefix"], arguments["iteration"])
        try:
            with _paused(run, "an evaluation"):
                return original(*positional, **named)
        finally:
            run.evaluating = None

    return evaluate_and_print_results


def wrap_evaluate(original: Function) -> Function:
    """Writes an evaluation's losses to the metrics file."""

    @functools.wraps(original)
    def evaluate(*positional: Any, **named: Any) -> Any:
        result = original(*positional, **named)
        run = runs.current()
        if run is not None and run.evaluating is not None and result[0] is not None:
            run.monitor.evaluated(*run.evaluating, losses=result[0])
        return result

    return evaluate


def wrap_checkpoint_and_decide_exit(original: Function) -> Function:
    """It asks all ranks in every iteration whether to stop; where plans are run, only while the pipeline is empty."""

    @functools.wraps(original)
    def checkpoint_and_decide_exit(*positional: Any, **named: Any) -> bool:
        run = runs.current()
        if run is None or run.is_drained():
            return bool(original(*positional, **named))
        # Who wants to stop says so in the records, and the pipeline drains soon.
        args = run.args
        asked = args.exit_signal_handler, args.exit_duration_in_mins
        args.exit_signal_handler, args.exit_duration_in_mins = False, None
        try:
            return bool(original(*positional, **named))
        finally:
            args.exit_signal_handler, args.exit_duration_in_mins = asked

    return checkpoint_and_decide_exit


def wrap_save_checkpoint_and_time(original: Function) -> Function:
    """The pipeline must be empty, and training time stands still."""

    @functools.wraps(original)
    def save_checkpoint_and_time(*positional: Any, **named: Any) -> Any:
        run = runs.current()
        with _paused(run, "a checkpoint") if run is not None else contextlib.nullcontext():
            return original(*positional, **named)

    return save_checkpoint_and_time


@contextlib.contextmanager
def _paused(run: Run, purpose: str) -> Iterator[None]:
    """Training stands still inside, with the pipeline empty."""
    run.require_drained(purpose)
    run.monitor.pause()
    try:
        yield
    finally:
        run.monitor.resume()


def wrap_maybe_finalize_async_save(original: Function) -> Function:
    """It agrees with all ranks whether the save is complete; until a drain it can wait."""

    @functools.wraps(original)
    def maybe_finalize_async_save(*positional: Any, **named: Any) -> Any:
        run = runs.current()
        return original(*positional, **named) if run is None or run.is_drained() else None

    return maybe_finalize_async_save


def wrap_reduce_max_stat_across_model_parallel_group(original: Function) -> Function:
    """Reduces over all stages what every stage has already: the learning rate of the log line."""

    @functools.wraps(original)
    def reduce_max_stat_across_model_parallel_group(stat: Any, *positional: Any, **named: Any) -> Any:
        run = runs.current()
        return stat if run is not None and run.runs_plans else original(stat, *positional, **named)

    return reduce_max_stat_across_model_parallel_group


def wrap_consume_seqlen_stats_in_iteration(original: Function) -> Function:
    """Sums the lengths of packed sequences, by which Megatron counts FLOPs, over the ranks of one stage rather than of all.

    A stage sees all micro-batches of its replica: here those that it has forwarded since its last update, which on the last
    stage are the window's, and on all stages come to the same at a drain.
    """

    @functools.wraps(original)
    def consume_seqlen_stats_in_iteration() -> tuple[float | None, float | None]:
        from megatron.training import training

        run = runs.current()
        sums: torch.Tensor | None = training._seqlen_stats_in_iteration  # (2,): of the lengths, and of their squares
        if run is None or not run.runs_plans or sums is None:
            return original()  # without packed sequences it asks nobody
        torch.distributed.all_reduce(
            sums, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        )
        tokens, squares = sums.tolist()
        sums.zero_()
        training._seqlen_stats_active = False
        counted = len(run.stages) * run.args.tensor_model_parallel_size * run.args.context_parallel_size
        return tokens / counted, squares / counted

    return consume_seqlen_stats_in_iteration


def wrap_track_indexer_metrics(original: Function) -> Function:
    """Sums the loss of the sparse attention's indexers over all stages at drains only."""

    @functools.wraps(original)
    def track_indexer_metrics(
        loss_scale: float,
        iteration: int,
        writer: Any,
        wandb_writer: Any = None,
        total_loss_dict: dict[str, Any] | None = None,
        per_layer_logging: bool = False,
    ) -> None:
        run = runs.current()
        if run is None or not run.runs_plans:
            original(loss_scale, iteration, writer, wandb_writer, total_loss_dict, per_layer_logging)
        elif iterations := run.drained_iterations():
            # The mean since the last drain, and so not for the log interval's average.
            original(loss_scale / iterations, iteration, writer, wandb_writer)

    return track_indexer_metrics


def wrap_validate_result(original: Function) -> Function:
    """Looks at each loss and each bucket's gradients at once; where plans are run, with the one wait of the update."""

    @functools.wraps(original)
    def validate_result(
        self: Any,
        result: Any,
        rejection_func: Callable[[Any], Any],
        message: str,
        comparison_func: Any = None,
        tolerance: float = 0.0,
        fatal: bool = True,
    ) -> None:
        def validated(rejects: Callable[[Any], Any]) -> None:
            original(self, result, rejects, message, comparison_func, tolerance, fatal)

        run = runs.current()
        if run is None or run.is_drained():  # no update follows an evaluation
            validated(rejection_func)
            return
        result = result.detach() if isinstance(result, torch.Tensor) else result  # a loss would hold its graph
        rejected = rejection_func(result)
        if isinstance(rejected, torch.Tensor) and rejected.numel() == 1:
            run.stage_here().readings.check(rejected, lambda: validated(lambda result: True))
        elif rejected:
            validated(lambda result: True)

    return validate_result


def wrap_l2_norm_impl(original: Function) -> Function:
    """Megatron's own, used without Transformer Engine and Apex, reads the norm of each parameter to the host: a wait for
    each. Where plans are run they stay on the device.
    """

    def l2_norm_impl(chunk_size: int, noop_flag: Any, tensor_lists: list[list[torch.Tensor]], *args: Any) -> Any:
        run = runs.current()
        if original is not local_multi_tensor_l2_norm or run is None or not run.runs_plans:
            return original(chunk_size, noop_flag, tensor_lists, *args)
        norms = torch._foreach_norm(tensor_lists[0])
        return torch.linalg.vector_norm(torch.stack(norms)).view(1), None

    return l2_norm_impl
