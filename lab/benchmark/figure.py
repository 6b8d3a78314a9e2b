"""The figure of a benchmark: speed-up beside its limit, and throughput, against the number of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paci_megatron.telemetry.plotting import finish, look, save


def write_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Two axes for each number of stages, one line for each schedule; limits are dotted."""
    from matplotlib.figure import Figure

    counts = sorted({row["num_stages"] for row in rows})
    schedules = list(dict.fromkeys(row["schedule"] for row in rows))
    figure = Figure(figsize=(9.6, 3.9 * len(counts)), layout="constrained")
    panels = figure.subplots(len(counts), 2, squeeze=False)
    for num_stages, (left, right) in zip(counts, panels, strict=True):
        for index, schedule in enumerate(schedules):
            mine = [row for row in rows if (row["num_stages"], row["schedule"]) == (num_stages, schedule)]
            mine.sort(key=lambda row: row["microbatches_per_update"])
            a = [row["microbatches_per_update"] for row in mine]
            style = look(index)
            right.plot(a, [row["tokens_per_second"] for row in mine], label=schedule, **style)
            if mine and mine[0]["speedup_vs_flush"] is not None:
                left.plot(a, [row["speedup_vs_flush"] for row in mine], label=schedule, **style)
                limit = {"color": style["color"], "linestyle": ":", "marker": "_", "markersize": 14, "linewidth": 1.0}
                left.plot(a, [row["limit_vs_flush"] for row in mine], label="_", **limit)
        left.set(title=f"{num_stages} stages", ylabel="speed-up over 1F1B-flush (dotted: limit)")
        right.set(title=f"{num_stages} stages", ylabel="tokens per second", ylim=(0, None))
        for axes in (left, right):
            ticks = sorted({row["microbatches_per_update"] for row in rows if row["num_stages"] == num_stages})
            axes.set(xlabel="micro-batches per update", xticks=ticks)
            if axes.lines:  # speed-ups need flush
                axes.legend(frameon=False)
            finish(axes)
    save(figure, path)
