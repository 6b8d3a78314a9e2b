"""One rank of a measured training: ``pretrain_gpt_paci.py`` itself, with clocks around what is measured.

All of it is put in place here, in a process that ends with the measurement; the package knows nothing of it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from paci_megatron.runtime.device import Stopwatch

from .jobs import Job, RankResult
from .padding import Padding


def run_rank(rank: int, job: Job) -> RankResult:
    """Train as this rank of the process group that the environment describes."""
    import pretrain_gpt_paci
    from paci_megatron.plugin import run as runs

    result = RankResult(rank)
    with contextlib.ExitStack() as stack:
        if job.is_bare:
            _suppress_records()
        if job.measures_memory:
            stack.enter_context(_measured_memory(result))
        else:
            padding = Padding(job.stage_times[rank], rank) if job.stage_times is not None else None
            _record_iterations(job, result, _Steps(padding))
        sys.argv = ["pretrain_gpt_paci.py", *job.argv]
        pretrain_gpt_paci.main()
        run = runs.current()
        if run is not None and run.runs_plans:
            result.slack = run.slack
    return result


class _Steps:
    """Clocks, and padding if any, around Megatron's ``forward_step`` and ``backward_step``, by whichever schedule."""

    def __init__(self, padding: Padding | None) -> None:
        self.padding = padding
        self._has_accelerator = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator() if self._has_accelerator else None
        self.forward_watch, self.backward_watch = (Stopwatch(device or torch.device("cpu")) for _ in range(2))

        import megatron.core.pipeline_parallel.schedules as schedules

        from paci_megatron.runtime import compute

        forward = self._around(schedules.forward_step, self.forward_watch, padding.forward if padding else None)
        backward = self._around(schedules.backward_step, self.backward_watch, padding.backward if padding else None)
        # Before the plugin is installed, so that its meters are outside and count the padding as computing. PACI has
        # imported the functions by name.
        for module in (schedules, compute):
            _replace(module, forward_step=forward, backward_step=backward)

    def _around(
        self, original: Callable[..., Any], watch: Stopwatch, pad: Callable[[Callable[[], Any]], Any] | None
    ) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(*positional: Any, **named: Any) -> Any:
            def work() -> Any:
                returned = original(*positional, **named)
                if pad is not None and self._has_accelerator:
                    torch.accelerator.synchronize()
                return returned

            watch.start()
            returned = work() if pad is None else pad(work)
            watch.stop()
            return returned

        return step


def _record_iterations(job: Job, result: RankResult, steps: _Steps) -> None:
    """Fill ``result`` at the end of each of the monitor's iterations. The meter is read twice: before and after the
    measured ones.
    """
    from paci_megatron.plugin.monitor import RunMonitor

    original = RunMonitor.end_iteration
    microbatches = job.iterations * job.microbatches_per_update

    def take(monitor: RunMonitor) -> None:
        stages = [meter.take_figures() for meter in monitor.meters]  # two in a process of a V
        busy_s, wall_s = sum((1 - each.bubble_fraction) * each.wall_s for each in stages), stages[0].wall_s
        forward_s, backward_s = steps.forward_watch.take_s(), steps.backward_watch.take_s()
        result.forward_s, result.backward_s = forward_s / microbatches, backward_s / microbatches
        result.update_s = max(busy_s - forward_s - backward_s, 0.0) / job.iterations
        result.utilization, result.max_drift = busy_s / wall_s, max(each.max_drift for each in stages)
        if steps.padding is not None:
            result.actions, result.overruns = steps.padding.take_counts()

    @functools.wraps(original)
    def end_iteration(monitor: RunMonitor, iteration: int, **named: Any) -> None:
        original(monitor, iteration, **named)
        if steps.padding is not None:
            steps.padding.skip_update()
        if iteration in (job.warmup, job.warmup + job.iterations):
            take(monitor)
        result.ends_s.append(time.monotonic())

    _replace(RunMonitor, end_iteration=end_iteration)


def _replace(owner: object, **replacements: Callable[..., Any]) -> None:
    """Set these names of a module or class, for the rest of the process."""
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def _suppress_records() -> None:
    """Let PACI's stages tell each other nothing."""
    from paci_megatron.runtime.control import Record
    from paci_megatron.runtime.links import StageLink

    def receive(link: StageLink) -> Record:
        return Record()

    def nothing(link: StageLink, record: Record | None = None) -> None:
        pass

    _replace(StageLink, receive_report=receive, receive_total=receive, send_report=nothing, send_total=nothing)
    _replace(StageLink, post_receive_report=nothing, post_receive_total=nothing)


@contextlib.contextmanager
def _measured_memory(result: RankResult) -> Iterator[None]:
    """Measure the most that autograd holds for backwards, from the first iteration on."""
    from paci_megatron.plugin.monitor import RunMonitor
    from paci_megatron.runtime.saved import SavedActivations

    begin_iteration, watched = RunMonitor.begin_iteration, SavedActivations.watched
    saved: SavedActivations | None = None
    with contextlib.ExitStack() as stack:

        def watched_from_here(monitor: RunMonitor) -> None:
            nonlocal saved
            if saved is None:
                saved = SavedActivations(value for value in gc.get_objects() if isinstance(value, torch.nn.Parameter))
                stack.enter_context(watched(saved))
                if torch.accelerator.is_available():
                    torch.accelerator.reset_peak_memory_stats()
            begin_iteration(monitor)

        _replace(RunMonitor, begin_iteration=watched_from_here)
        # PACI's stages watch their first micro-batches themselves, and the innermost watch alone would see them.
        _replace(SavedActivations, watched=lambda counter: contextlib.nullcontext())
        yield
    assert saved is not None
    result.peak_activation_bytes = saved.peak_bytes
    if torch.accelerator.is_available():
        result.peak_allocated_bytes = torch.accelerator.max_memory_allocated()
