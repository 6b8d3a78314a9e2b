"""The figures by stage: where the time went, drift against its bound, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paci_megatron.schedule.schedules import max_in_flight
from paci_megatron.simulate.costs import Costs

from .figures import Figure, Plot, plain, plot
from .measures import by_stage, mean_by_stage, memory_by_stage, promised_bubble
from .runs import ReportedRun

_PARTS = ("forward", "backward", "update", "transfers", "waiting", "other")
_MEMORY = {
    "saved_activation_bytes": "kept for backwards",
    "process_peak_bytes": "most allocated by PyTorch",
    "process_reserved_bytes": "most reserved by PyTorch",
    "process_device_bytes": "on the device beside PyTorch's",
}


def _stages(count: int) -> list[str]:
    return [str(stage) for stage in range(count)]


def bars(index: int, name: str, values: Sequence[float | None], template: str, **more: Any) -> Plot:
    """A bar a stage, of the run with this index."""
    return {
        **{"type": "bar", "name": plain(name), "x": _stages(len(values)), "y": list(values), "offsetgroup": str(index)},
        **{"marker": {"color": f"@run-{index}"}, "hovertemplate": f"stage %{{x}}: {template}", **more},
    }


def marks(index: int, name: str, values: Sequence[float], template: str) -> Plot:
    """A stroke a stage, over its bar: what the figure is held against."""
    stroke = {"symbol": "line-ew", "line": {"width": 3, "color": "@text"}}
    return {
        **{"type": "scatter", "mode": "markers", "name": name, "x": _stages(len(values)), "y": list(values)},
        **{"marker": stroke, "hovertemplate": f"stage %{{x}}: {template}", "offsetgroup": str(index)},
    }


def bubble(runs: Sequence[ReportedRun]) -> Figure:
    """Each stage's bubble, and what the schedule promises."""
    figure = Figure(
        "bubble",
        "Bubble of each stage, measured against promised",
        "The share of the time between drains, fills and drains included, in which a stage computes nothing. The strokes "
        "are what the order alone costs if all stages take the same time and transfers none; what is above them is "
        "imbalance, transfers, updates and the machine.",
        height=300,
    )
    data = []
    for index, run in enumerate(runs):
        if not run.drains:
            figure.notes.append(f"{run.label}: no drain yet, and the bubble is measured from drain to drain.")
            continue
        shares = mean_by_stage(run, "bubble_fraction", "wall_s")
        data.append(bars(index, run.label, shares, "%{y:.1%} bubble"))
        promised = promised_bubble(run)
        if promised is None:
            figure.notes.append(f"{run.label}: its metrics file does not say how many micro-batches make an update.")
        else:
            data.append(marks(index, "promised", [promised] * len(shares), f"{promised:.1%} promised by the order alone"))
    shape = {"tickformat": ".0%", "rangemode": "tozero"}
    figure.variants["Bubble"] = [_grouped(plot(data, "stage", "bubble", yaxis=shape))]
    return figure


def _grouped(drawn: Plot) -> Plot:
    """Runs side by side, the strokes over the bars of their run. No bar is very broad, and no stroke broader than a bar."""
    stages = max((len(trace["x"]) for trace in drawn["data"]), default=1)
    gap = max(0.25, 1 - 0.12 * stages)
    drawn["layout"] |= {"barmode": "group", "scattermode": "group", "bargap": gap, "scattergap": gap}
    drawn["layout"]["xaxis"] |= {"type": "category", "showgrid": False}
    strokes = [trace["marker"] for trace in drawn["data"] if trace.get("mode") == "markers"]
    for marker in strokes:
        marker["size"] = max(4, min(26, 320 // (stages * len(strokes))))
    return drawn


def time_by_stage(runs: Sequence[ReportedRun]) -> Figure:
    """Where each stage's time went, of the traced runs."""
    figure = Figure(
        "time",
        "Where each stage's time went",
        "Of one iteration, by the traces. Waiting is for a neighbour's tensor. Other is what no action accounts for: under "
        "1F1B-flush, which is Megatron's own, waiting and transfers are in it.",
        height=300,
    )
    plots = []
    for run in runs:
        if run.trace is None:
            figure.notes.append(f"{run.label}: {run.no_trace}.")
            continue
        stages = run.trace.figures(Costs(run.trace.costs))
        data = [
            {
                **{"type": "bar", "name": part, "x": _stages(len(stages)), "marker": {"color": f"@{part}"}},
                **{"y": [1000 * stage[f"{part}_s"] for stage in stages]},
                **{"hovertemplate": f"stage %{{x}}: %{{y:.4g}} ms {part}"},
            }
            for part in _PARTS
        ]
        title = {"text": plain(f"{run.label}, iterations {run.trace.first} to {run.trace.last}")}
        plots.append(plot(data, "stage", "ms an iteration", title=title))
    most = max((_height(drawn) for drawn in plots), default=0.0)
    for drawn in plots:
        drawn["layout"]["yaxis"]["range"] = [0, most * 1.05]
        _grouped(drawn)["layout"]["barmode"] = "stack"
    figure.variants["Time"] = plots
    return figure


def _height(stacked: Plot) -> float:
    return max(sum(values) for values in zip(*(trace["y"] for trace in stacked["data"]), strict=True))


def drift(runs: Sequence[ReportedRun]) -> Figure:
    """Drift of each stage against its bound."""
    figure = Figure(
        "drift",
        "Drift of each stage against its bound",
        "Drift is how many updates a stage has made between a micro-batch's forward and its backward. First the largest "
        "that was measured; the strokes are ceil((N-1-s)/a), which the schedule guarantees. Then the mean; the strokes "
        "are (N-1-s)/a, that of a full pipeline. In units of weights it is how far a stage's weights have moved "
        "meanwhile, as a share of the weights.",
        height=280,
    )
    largest: list[Plot] = []
    mean: list[Plot] = []
    for index, run in enumerate(runs):
        if run.schedule == "1f1b":
            figure.notes.append(f"{run.label}: flushes before every update, so it has no drift.")
        elif not run.drains:
            figure.notes.append(f"{run.label}: no drain yet, and drift is written down at drains.")
        else:
            largest.append(bars(index, run.label, by_stage(run, "max_drift"), "largest drift %{y} updates"))
            mean.append(bars(index, run.label, mean_by_stage(run, "mean_drift", "updates"), "mean drift %{y:.4g} updates"))
            if (bounds := run.drift_bounds()) is None:
                figure.notes.append(f"{run.label}: its metrics file does not say how many micro-batches make an update.")
                continue
            largest.append(marks(index, "bound", bounds, "at most %{y} updates"))
            mean.append(marks(index, "bound", _full_pipeline(run), "%{y:.4g} updates when full"))
    whole = {"rangemode": "tozero", "dtick": 1 if _largest(largest) < 8 else None}
    plots = [plot(largest, "stage", "largest (updates)", yaxis=whole), plot(mean, "stage", "mean (updates)")]
    figure.variants["Drift"] = [_grouped(drawn) for drawn in [*plots, *_weight_changes(runs)]] if largest else []
    return figure


def _largest(data: Sequence[Plot]) -> float:
    return max((value for trace in data for value in trace["y"]), default=0)


def _full_pipeline(run: ReportedRun) -> list[float]:
    n, a, slack = run.num_stages or 0, run.microbatches_per_update or 1, run.slacks()[-1]
    return [(max_in_flight(stage, n, slack) - 1) / a for stage in range(n)]


def _weight_changes(runs: Sequence[ReportedRun]) -> list[Plot]:
    """Drift in units of weights, where the runs have measured it."""
    known = [
        (index, run) for index, run in enumerate(runs) if run.schedule != "1f1b" and _measures(run, "max_weight_change")
    ]
    if not known:
        return []
    largest = [
        bars(index, run.label, by_stage(run, "max_weight_change"), "weights change by %{y:.3%} at most")
        for index, run in known
    ]
    mean = [
        bars(index, run.label, mean_by_stage(run, "mean_weight_change", "updates"), "weights change by %{y:.3%} on average")
        for index, run in known
    ]
    share = {"tickformat": ".2~%", "rangemode": "tozero"}
    return [
        plot(largest, "stage", "largest (of the weights)", yaxis=share),
        plot(mean, "stage", "mean (of the weights)", yaxis=share),
    ]


def _measures(run: ReportedRun, name: str) -> bool:
    """Whether every stage has this figure at every drain: a file of an earlier version may lack it."""
    return bool(run.drains) and all(stage.get(name) is not None for drain in run.drains for stage in drain)


def memory(runs: Sequence[ReportedRun]) -> Figure:
    """The most that each stage held of each kind."""
    figure = Figure(
        "memory",
        "Memory by stage",
        "The most that each stage held, by what holds it. PACI keeps the activations of as many micro-batches as 1F1B-flush "
        "and one copy of the weights.",
        height=280,
    )
    held = [memory_by_stage(run) for run in runs]
    for run, kinds in zip(runs, held, strict=True):
        if not kinds:
            figure.notes.append(f"{run.label}: no memory was counted (activations under PACI, the rest on GPUs).")
        elif "saved_activation_bytes" not in kinds:
            figure.notes.append(f"{run.label}: activations are counted under PACI only.")
    copies = [by_stage(run, "copied_weight_bytes") if _measures(run, "copied_weight_bytes") else [] for run in runs]
    plots = [_memory_plot(runs, title, [kinds.get(name, []) for kinds in held]) for name, title in _MEMORY.items()]
    plots.append(_memory_plot(runs, "copies of older weights", [each if any(each) else [] for each in copies]))
    figure.variants["Memory"] = [drawn for drawn in plots if drawn["data"]]
    return figure


def _memory_plot(runs: Sequence[ReportedRun], title: str, held: Sequence[Sequence[float | None]]) -> Plot:
    most = max((value for values in held for value in values if value is not None), default=0)
    unit, name = (1 << 30, "GiB") if most >= 1 << 30 else (1 << 20, "MiB")
    data = []
    for index, (run, values) in enumerate(zip(runs, held, strict=True)):
        if values:
            shown = [None if value is None else value / unit for value in values]
            data.append(bars(index, run.label, shown, f"%{{y:.4g}} {name} {title}"))
    return _grouped(plot(data, "stage", name, title={"text": title}))
