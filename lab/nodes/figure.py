"""The figure of schedules on nodes: time of an iteration against the delay between them, measured and foretold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paci_megatron.telemetry.plotting import finish, look, save


def write_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line for each schedule; what the simulator foretells is dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.9), layout="constrained")
    axes = figure.subplots()
    for index, schedule in enumerate(dict.fromkeys(row["schedule"] for row in rows)):
        mine = sorted((row for row in rows if row["schedule"] == schedule), key=lambda row: float(row["delay_ms"]))
        delays, style = [row["delay_ms"] for row in mine], look(index)
        axes.plot(delays, [row["ms_per_iteration"] for row in mine], label=schedule, **style)
        foretold = {"color": style["color"], "linestyle": ":", "marker": "_", "markersize": 14, "linewidth": 1.0}
        axes.plot(delays, [row["predicted_ms"] for row in mine], label="_", **foretold)
    axes.set(xlabel="delay each way, ms", ylabel="ms per iteration (dotted: foretold)", ylim=(0, None))
    axes.set(xticks=sorted({row["delay_ms"] for row in rows}))
    axes.legend(frameon=False)
    finish(axes)
    save(figure, path)
