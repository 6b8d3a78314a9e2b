"""From measurements to rows: throughput, speed-up over flush, and how well the simulator foretold both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from paci_megatron.simulate.costs import Costs, StageCosts

from .jobs import RankResult
from .settings import FLUSH, Case, Settings


@dataclass
class Measured:
    """A case with what its trainings measured so far, each by rank."""

    case: Case
    memory: list[RankResult] | None = None
    repeats: list[list[RankResult]] = field(default_factory=list)


def ms_per_iteration(ranks: Sequence[RankResult], warmup: int, iterations: int) -> float:
    """From the end of iteration ``warmup`` to that of the last measured one, each on the rank that ends it last.

    Under flush all ranks end an iteration together. Without, the first stage ends it last, and stages are never further
    apart than what is in flight; so it is one clock's interval but for a change of that distance. It is what the simulator
    calls throughput too.
    """
    begin_s, end_s = (max(rank.ends_s[k - 1] for rank in ranks) for k in (warmup, warmup + iterations))
    return 1000 * (end_s - begin_s) / iterations


def measured_costs(repeats: Sequence[Sequence[RankResult]]) -> Costs:
    """What the stages took where compute is real, the median over repeats."""
    stages = zip(*repeats, strict=True)
    return Costs(
        tuple(
            StageCosts(
                forward_s=median(result.forward_s for result in stage),
                backward_s=median(result.backward_s for result in stage),
                update_s=median(result.update_s for result in stage),
            )
            for stage in stages
        )
    )


def make_rows(settings: Settings, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each case that was timed at least once, in order."""
    timed = [one for one in measured if one.repeats]
    flushes = {_size(one.case): one for one in timed if one.case.arm.name == FLUSH}
    return [_row(settings, one, flushes.get(_size(one.case))) for one in timed]


def _size(case: Case) -> tuple[int, int]:
    return case.num_stages, case.microbatches_per_update


def _row(settings: Settings, one: Measured, flush: Measured | None) -> dict[str, Any]:
    case, ms = one.case, _all_ms(settings, one)
    n, a = _size(case)
    tokens_per_second = _tokens_per_second(settings, one)
    # With real compute the stages' times are those under flush: what it takes to foretell another schedule.
    costs = settings.timed_costs(n) or measured_costs((flush or one).repeats)
    slack = one.repeats[-1][0].slack
    predicted = settings.predicted_tokens_per_second(case, costs, slack)
    speedup = predicted_speedup = None
    if flush is not None:
        speedup = tokens_per_second / _tokens_per_second(settings, flush)
        predicted_speedup = predicted / settings.predicted_tokens_per_second(flush.case, costs)
    actions = sum(rank.actions for ranks in one.repeats for rank in ranks)
    stages = list(zip(*one.repeats, strict=True))
    return {
        "schedule": case.arm.name,
        "num_stages": n,
        "microbatches_per_update": a,
        "tokens_per_second": tokens_per_second,
        "speedup_vs_flush": speedup,
        "limit_vs_flush": case.arm.limit(n, a),
        "bottleneck_utilization": median(max(rank.utilization for rank in ranks) for ranks in one.repeats),
        "peak_activation_bytes": None if one.memory is None else [rank.peak_activation_bytes for rank in one.memory],
        "peak_allocated_bytes": None if one.memory is None else [rank.peak_allocated_bytes for rank in one.memory],
        "predicted_speedup": predicted_speedup,
        "predicted_speedup_error": None if not speedup or not predicted_speedup else predicted_speedup / speedup - 1,
        "predicted_tokens_per_second": predicted,
        "predicted_tokens_per_second_error": predicted / tokens_per_second - 1,
        "repeats": len(ms),
        "ms_per_iteration": ms,
        "spread": (max(ms) - min(ms)) / median(ms),
        "overrun_share": sum(rank.overruns for ranks in one.repeats for rank in ranks) / actions if actions else 0.0,
        "max_drift": [max(rank.max_drift for rank in stage) for stage in stages],
        "forward_ms": [1000 * fmean(rank.forward_s for rank in stage) for stage in stages],
        "backward_ms": [1000 * fmean(rank.backward_s for rank in stage) for stage in stages],
        "update_ms": [1000 * fmean(rank.update_s for rank in stage) for stage in stages],
        "slack": slack,
        "settings": _described(settings, case),
    }


def _all_ms(settings: Settings, one: Measured) -> list[float]:
    warmup = settings.warmup_of(one.case)
    return [ms_per_iteration(ranks, warmup, settings.iterations) for ranks in one.repeats]


def _tokens_per_second(settings: Settings, one: Measured) -> float:
    tokens = one.case.microbatches_per_update * settings.model.micro_batch_size * settings.model.seq_length
    return 1000 * tokens / median(_all_ms(settings, one))


def _described(settings: Settings, case: Case) -> dict[str, Any]:
    model = settings.model
    return {
        "timed_stage_ms": settings.stage_ms,
        "jitter": settings.jitter,
        "seed": settings.seed,
        "straggler": settings.straggler,
        "warmup": settings.warmup_of(case),
        "iterations": settings.iterations,
        "num_layers": settings.num_layers(case.num_stages),
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "seq_length": model.seq_length,
        "micro_batch_size": model.micro_batch_size,
        "vocab_size": model.vocab_size,
        "megatron_flags": settings.megatron_flags,
    }


_COLUMNS = (
    ("schedule", "{schedule}"),
    ("N", "{num_stages}"),
    ("a", "{microbatches_per_update}"),
    ("ms/iteration", "{median_ms:.1f}"),
    ("spread", "{spread:.1%}"),
    ("tokens/s", "{tokens_per_second:.1f}"),
    ("speed-up", "{speedup_vs_flush:.3f}"),
    ("limit", "{limit_vs_flush:.3f}"),
    ("predicted", "{predicted_speedup:.3f}"),
    ("error", "{predicted_speedup_error:+.1%}"),
    ("busiest", "{bottleneck_utilization:.1%}"),
    ("peak MB", "{peak_mb:.2f}"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader. ``busiest`` is the busiest stage's share of the time computing, ``peak`` is of the stage with
    most."""
    cells = [[title for title, _ in _COLUMNS]]
    for row in rows:
        peaks = row["peak_activation_bytes"]
        values = row | {"median_ms": median(row["ms_per_iteration"]), "peak_mb": max(peaks) / 1e6 if peaks else None}
        cells.append([_cell(template, values) for _, template in _COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        first, *others = (
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join([first, *others]))
    return "\n".join(lines)


def _cell(template: str, values: dict[str, Any]) -> str:
    name = template[1:].split(":")[0].rstrip("}")
    return "-" if values[name] is None else template.format(**values)


def overrun_warning(row: dict[str, Any]) -> str | None:
    """What to say if timed stages could not keep their time."""
    share = row["overrun_share"]
    if not share:
        return None
    return (
        f"warning: {row['schedule']} N={row['num_stages']} a={row['microbatches_per_update']}: {share:.1%} of the actions "
        "computed for longer than --timed-stage-ms gives them, and took longer; give more time, or a smaller model"
    )
