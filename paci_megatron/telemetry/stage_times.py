"""What the stages of a run took for a micro-batch, from its metrics file."""

from __future__ import annotations

from pathlib import Path

from paci_megatron.simulate.costs import StageCosts
from paci_megatron.usage import require

from .metrics_file import read_metrics


def run_microbatches(path: Path) -> int | None:
    """The run's micro-batches per update; None in a file of an earlier version, which does not say it."""
    runs = [event["microbatches_per_update"] for event in read_metrics(path) if event.get("event") == "run"]
    return int(runs[-1]) if runs else None


def measured_stages(path: Path, microbatches_per_update: int, update_ms: float) -> list[StageCosts]:
    """The stages' costs from the drains of a run, as far as its meters know them: each stage's computing time, of which a
    third is taken as forward. The first drain is left out if there are more: the stretch before it contains the start.
    """
    events = read_metrics(path)
    runs = [event for event in events if event.get("event") == "run"]
    folded = any(run.get("schedule") == "paci-v" and not run["emulated"] for run in runs)
    require(not folded, f"--metrics {path}: of paci-v, where two stages share a process's time; give a run of paci or 1f1b")
    drains = [event["stages"] for event in events if event.get("event") == "drain"]
    require(bool(drains), f"--metrics {path}: no drain event; stage times are written at drains, so let the run reach one")
    costs = []
    for stage, reports in enumerate(zip(*(drains[1:] or drains), strict=True)):
        busy_s = sum(report["wall_s"] * (1 - report["bubble_fraction"]) for report in reports)
        updates = sum(report["updates"] for report in reports)
        require(updates > 0, f"--metrics {path}: no update between drains on stage {stage}; give a longer run")
        update_busy_ms = busy_s / updates * 1000
        too_long = f"--update-ms {update_ms:g}: stage {stage} of {path} computes {update_busy_ms:.3g} ms in all; give less"
        require(update_ms < update_busy_ms, too_long)
        computing_s = (update_busy_ms - update_ms) / 1000 / microbatches_per_update
        costs.append(StageCosts(computing_s / 3, computing_s * 2 / 3, update_s=update_ms / 1000))
    return costs
