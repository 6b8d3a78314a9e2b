"""The figures of a report: each comes from a run's events by one rule, which is said here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from paci_megatron.schedule.schedules import flush_bubble_fraction, speedup_limit
from paci_megatron.telemetry.run_events import Event, named
from paci_megatron.telemetry.speed import log_intervals, steady_intervals

from .runs import ReportedRun


class Speed(NamedTuple):
    """Tokens a second, and whether the time between two drains alone is counted, where the pipeline is full."""

    tokens_per_s: float
    is_steady: bool


def speed(run: ReportedRun) -> Speed | None:
    """All tokens over all seconds of the steady log intervals; without any, of all but the first. None without log lines."""
    steady = steady_intervals(run.events)
    intervals = steady or log_intervals(run.events)[1:] or log_intervals(run.events)
    seconds = sum(interval.seconds for interval in intervals)
    if not seconds:
        return None
    return Speed(sum(interval.tokens for interval in intervals) / seconds, bool(steady))


@dataclass(frozen=True)
class Comparison:
    """A run beside the baseline. ``limit`` is (va+N-1)/(va) where the two differ by the schedule alone, 1F1B-flush with v
    chunks a stage, else None.
    """

    run: ReportedRun
    baseline: ReportedRun
    speedup: float
    limit: float | None


def compare(runs: Sequence[ReportedRun]) -> list[Comparison]:
    """Every other run beside the first of 1F1B-flush, or beside the first of all."""
    baseline = next((run for run in runs if run.schedule == "1f1b"), runs[0])
    known = speed(baseline)
    if known is None:
        return []
    found = []
    for run in runs:
        mine = speed(run)
        if run is not baseline and mine is not None:
            found.append(Comparison(run, baseline, mine.tokens_per_s / known.tokens_per_s, _limit(run, baseline)))
    return found


def _limit(run: ReportedRun, baseline: ReportedRun) -> float | None:
    n, a = run.num_stages, run.microbatches_per_update
    same = (n, a) == (baseline.num_stages, baseline.microbatches_per_update)
    if n is None or a is None or not same or (run.schedule, baseline.schedule) != ("paci", "1f1b"):
        return None
    return speedup_limit(n, a * baseline.header.get("chunks_per_stage", 1))


def measured_bubble(run: ReportedRun) -> float | None:
    """The mean over all stages and all time between drains, fills and drains included; None before the first drain."""
    stages = [stage for drain in run.drains for stage in drain]
    wall_s = sum(stage["wall_s"] for stage in stages)
    return sum(stage["bubble_fraction"] * stage["wall_s"] for stage in stages) / wall_s if wall_s else None


def promised_bubble(run: ReportedRun) -> float | None:
    """The same by the schedule alone, were all stages equal and transfers free: (N-1)/(aU+N-1) of the U updates from drain
    to drain, of one update under 1F1B-flush, where each of v chunks a stage is a v-th of its time. None where N or a is not
    known.
    """
    n, a = run.num_stages, run.microbatches_per_update
    if n is None or a is None or not run.drains:
        return None
    if run.schedule == "1f1b":
        return flush_bubble_fraction(n, a * run.header.get("chunks_per_stage", 1))
    full = [a * drain[0]["updates"] for drain in run.drains]
    return (n - 1) * len(full) / sum(slots + n - 1 for slots in full)


def by_stage(run: ReportedRun, name: str) -> list[float]:
    """The largest of this figure that each stage had between two drains."""
    return [max(values) for values in zip(*([stage[name] for stage in drain] for drain in run.drains), strict=True)]


def mean_by_stage(run: ReportedRun, name: str, weight: str) -> list[float]:
    """Each stage's mean of this figure over its drains, each with its ``weight``."""
    means = []
    for drains in zip(*run.drains, strict=True):
        known = [stage for stage in drains if isinstance(stage.get(name), int | float) and math.isfinite(stage[name])]
        total = sum(stage[weight] for stage in known)
        means.append(sum(stage[name] * stage[weight] for stage in known) / total if total else math.nan)
    return means


def sums_by_stage(run: ReportedRun, name: str) -> list[int]:
    """Each stage's sum of this figure."""
    return [sum(values) for values in zip(*([stage[name] for stage in drain] for drain in run.drains), strict=True)]


def final_perplexity(run: ReportedRun) -> tuple[int, float] | None:
    """The iteration of the last evaluation on validation data and its perplexity; None if there was none."""
    if not run.curves.validation:
        return None
    last = run.curves.validation[-1]
    return last.update, math.exp(last.loss) if last.loss < 700 else math.inf


def memory_by_stage(run: ReportedRun) -> dict[str, list[int | None]]:
    """The most bytes of each kind on each stage, or process where several stages share one."""
    kinds: dict[str, list[int | None]] = {}
    for event in named(run.events, "memory"):
        for name, values in event.items():
            if name.endswith("_bytes") and any(value is not None for value in values):
                before = kinds.get(name, [])
                known = before if len(before) == len(values) else [None] * len(values)  # a resumed run may have other stages
                kinds[name] = [_most(old, new) for old, new in zip(known, values, strict=True)]
    return kinds


def _most(old: int | None, new: int | None) -> int | None:
    return max((value for value in (old, new) if value is not None), default=None)


def norms(run: ReportedRun) -> list[tuple[int, float]]:
    """The logged gradient norms of all stages together, by iteration."""
    logged: list[Event] = [event for event in named(run.events, "train") if event.get("grad_norm") is not None]
    return [(event.get("grad_norm_iteration") or event["iteration"], event["grad_norm"]) for event in logged]


def thin(values: Sequence[tuple[float, ...]], most: int) -> list[tuple[float, ...]]:
    """``values`` themselves, or the means of as many neighbours as it takes for at most ``most`` points, and the last."""
    size = -(-len(values) // most)
    if size <= 1:
        return list(values)
    groups = [values[at : at + size] for at in range(0, len(values), size)]
    means = [tuple(map(fmean, zip(*group, strict=True))) for group in groups[:-1]]
    return [*means, values[-1]]
