"""Tells a run's progress: PACI's line beside Megatron's log line, and the metrics file, for either schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches

from paci_megatron.runtime.control import Record
from paci_megatron.runtime.device import memory, reset_peak_memory
from paci_megatron.runtime.meters import StageFigures, StageMeter, together_idle
from paci_megatron.telemetry.metrics_file import MetricsFile

from .drains import Drains
from .log import PREFIX, print_last_rank, print_line
from .run_header import run_header


class RunMonitor:
    """Listens to one rank's training loop. The last rank, the one Megatron logs on, prints and writes.

    Training time, ``train_s`` in the metrics, runs from the first iteration and stands still in evaluations and saves.
    """

    def __init__(self, args: Any, meters: list[StageMeter], drains: Drains) -> None:
        self.meters = meters
        self._args = args
        self._drains = drains
        self._schedule: str = args.pipeline_schedule
        self._drained = True
        self._speaks = dist.get_rank() == dist.get_world_size() - 1
        path = args.paci_metrics_file
        self._file = MetricsFile(path) if path and self._speaks else None
        self._begin_s = time.perf_counter()
        self._first_iteration_s: float | None = None
        self._paused_s = 0.0
        self._paused_since: float | None = None
        self._logged_s = 0.0
        self._losses: list[torch.Tensor] = []
        if self._file is not None:
            self._file.write("run", **run_header(args, get_num_microbatches(), meters[0].device))
        self._total: tuple[int, Record] | None = None  # iteration and record of all stages, the latest that is known
        self._skipped = 0

    def begin_iteration(self) -> None:
        """An iteration starts."""
        if self._first_iteration_s is None:
            self._first_iteration_s = time.perf_counter()
            reset_peak_memory(self.meters[0].device)
        if self._drained:
            for meter in self.meters:
                meter.restart()

    def end_iteration(
        self, iteration: int, losses: dict[str, torch.Tensor], totals: dict[int, Record] | None = None
    ) -> None:
        """Iteration ``iteration`` (from 1) is done. At a drain, collective over the pipeline.

        ``totals`` are the records of all stages, by iteration, that have become known since the last.
        """
        self._record_totals(iteration, totals or {})
        if "lm loss" in losses:
            self._losses.append(losses["lm loss"].detach())
        self._drained = self._drains.is_drain(iteration)
        if self._drained:
            self._gather_stages(iteration)

    def _record_totals(self, iteration: int, totals: dict[int, Record]) -> None:
        """Norms to the writers, each under its own iteration. Megatron itself writes that of the iteration just done."""
        if totals:
            self._total = max(totals.items())
        self._skipped += sum(not total.is_finite for total in totals.values())
        if self._speaks:
            for of_iteration, total in sorted(totals.items()):
                if of_iteration != iteration:
                    _write_scalars({"grad-norm": total.norm}, of_iteration)

    def log_interval(self, iteration: int) -> None:
        """Megatron has logged ``iteration``: print what is known of all stages, write the interval's mean loss and time."""
        if self._speaks and self._schedule != "1f1b" and self._total is not None:
            print_line(interval_line(iteration, *self._total, self._skipped))
        if self._file is None or not self._losses:
            return
        train_s, count = self._train_s(), len(self._losses)
        self._file.write(
            "train",
            **self._position(iteration),
            iterations=count,
            loss=float(torch.stack(self._losses).mean()),
            ms_per_iteration=1000 * (train_s - self._logged_s) / count,
            **_total_figures(self._total),
        )
        self._losses.clear()
        self._logged_s = train_s

    def evaluated(self, prefix: str, iteration: int, losses: dict[str, torch.Tensor]) -> None:
        """An evaluation is done; ``losses`` are its means (last stage only)."""
        if self._file is None or "lm loss" not in losses:
            return
        loss = float(losses["lm loss"])
        # As Megatron prints it: beyond exp(20) the number says nothing.
        perplexity = math.exp(min(20.0, loss))
        self._file.write("evaluation", **self._position(iteration), prefix=prefix, loss=loss, perplexity=perplexity)

    def tell(self, event: str, iteration: int, line: str, **fields: Any) -> None:
        """Something was decided after ``iteration``: ``line`` goes to the log, ``event`` with the fields to the metrics."""
        print_last_rank(line)
        if self._file is not None:
            self._file.write(event, iteration=iteration, **fields)

    def pause(self) -> None:
        """Training time stands still from here."""
        self._paused_since = time.perf_counter()

    def resume(self) -> None:
        """Training time goes on."""
        assert self._paused_since is not None
        self._paused_s += time.perf_counter() - self._paused_since
        self._paused_since = None

    def _train_s(self) -> float:
        if self._first_iteration_s is None:
            return 0.0
        now = self._paused_since if self._paused_since is not None else time.perf_counter()
        return now - self._first_iteration_s - self._paused_s

    def _position(self, iteration: int) -> dict[str, Any]:
        args = self._args
        return {
            "schedule": self._schedule,
            "iteration": iteration,
            "tokens": args.consumed_train_samples * args.seq_length,
            "train_s": self._train_s(),
            "time_s": time.perf_counter() - self._begin_s,
        }

    def _gather_stages(self, iteration: int) -> None:
        """Gather every stage's figures since the last drain. A collective, which is why it happens at drains only."""
        group = parallel_state.get_pipeline_model_parallel_group()
        gathered: list[Any] = [None] * group.size()
        own = [meter.take_figures() for meter in self.meters]
        if self.meters[0].beside:
            idle = together_idle([each.bubble_fraction for each in own])
            own = [replace(each, bubble_fraction=idle) for each in own]
        held = [meter.saved_activation_bytes for meter in self.meters]
        mine = list(zip(own, held, strict=True)), memory(self.meters[0].device)
        dist.all_gather_object(gathered, mine, group=group)
        by_stage = sorted((stage for stages, _ in gathered for stage in stages), key=lambda each: each[0].stage_index)
        figures, saved = zip(*by_stage, strict=True)
        if not self._speaks:
            return
        if self._schedule != "1f1b":
            print_line(stage_line(iteration, figures))
            _write_scalars(_stage_scalars(figures), iteration)
        if self._file is not None:
            stages = [each.as_dict() for each in figures]
            self._file.write("drain", schedule=self._schedule, iteration=iteration, stages=stages)
            self._file.write(
                "memory",
                iteration=iteration,
                saved_activation_bytes=saved,
                process_peak_bytes=[held.peak_allocated for _, held in gathered],
                process_reserved_bytes=[held.peak_reserved for _, held in gathered],
                process_device_bytes=[held.beside for _, held in gathered],
            )


def _stage_scalars(figures: Sequence[StageFigures]) -> dict[str, float]:
    return {
        f"paci/{name.replace('_', '-')}/stage-{each.stage_index}": value
        for each in figures
        for name, value in each.as_dict().items()
        if name != "stage_index"
    }


def _write_scalars(scalars: dict[str, float], iteration: int) -> None:
    """To Megatron's TensorBoard and Weights & Biases writers, where there are any."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    if (writer := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(scalars, iteration)


def interval_line(iteration: int, of_iteration: int, total: Record, skipped: int) -> str:
    """PACI's line beside Megatron's log line: all stages' figures as far as they are known, up to ``of_iteration``."""
    fields = [f"grad norm: {total.norm:.3f} (of iteration {of_iteration})"]
    if not math.isnan(total.least_bubble):
        more = f" (up to {total.host_bound:.1%} more where a GPU waits for its host)" if total.host_bound >= 0.005 else ""
        fields.append(f"bubble: {total.least_bubble:.1%} busiest stage, {total.most_bubble:.1%} idlest{more}")
    of_weights = f" ({_percent(total.weight_change)} of the weights)" if total.weight_change else ""
    fields += [f"max drift: {total.max_drift:.0f}{of_weights}", f"skipped updates: {skipped}"]
    return f"{PREFIX} iteration {iteration:8d} | {' | '.join(fields)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _total_figures(known: tuple[int, Record] | None) -> dict[str, Any]:
    """For the metrics file."""
    of_iteration, total = known if known is not None else (None, Record())
    has_bubble = not math.isnan(total.least_bubble)
    return {
        "grad_norm": None if known is None else total.norm,
        "grad_norm_iteration": of_iteration,
        "least_bubble_fraction": total.least_bubble if has_bubble else None,
        "most_bubble_fraction": total.most_bubble if has_bubble else None,
        "weight_change": None if known is None else total.weight_change,
        "host_bound_fraction": total.host_bound if has_bubble else None,
    }


def stage_line(iteration: int, figures: Sequence[StageFigures]) -> str:
    """PACI's log line: each stage's figures since the last drain, first stage to last."""

    def column(values: list[str]) -> str:
        return " ".join(values)

    return (
        f"{PREFIX} drained after iteration {iteration:8d} | {figures[0].updates} updates | by stage:"
        f" max drift {column([str(f.max_drift) for f in figures])} |"
        f" mean drift {column([f'{f.mean_drift:.3f}' for f in figures])} |"
        f" of the weights {column([_percent(f.mean_weight_change) for f in figures])} |"
        f" in flight {column([str(f.max_in_flight) for f in figures])} |"
        f" bubble {column([f'{f.bubble_fraction:.1%}' for f in figures])} |"
        f" skipped updates {column([str(f.skipped_updates) for f in figures])} |"
    )
