"""What a run will do, in the lines that it logs at its start."""

from __future__ import annotations

from paci_megatron.config import PaciConfig
from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.schedules import even_slack


def describe(config: PaciConfig, clip_grad: float, microbatches_per_update: int) -> list[str]:
    """Schedule, drift, memory and clipping; a line each."""
    num_stages, a = config.num_stages, microbatches_per_update
    plan = Plan(config.schedule, num_stages, a, config.slack)
    where = " emulated in one process" if config.emulates else ""
    if config.folded is not None and not config.emulates:
        where = f" on {config.num_processes} processes"
    clipping = f"clipping: {_clipping(config, clip_grad, plan.record_lag)}"
    if config.schedule == "1f1b":
        return [f"schedule {config.schedule}: {num_stages} stages{where}, {a} micro-batches per update", clipping]
    drift = [plan.max_drift(stage) for stage in range(num_stages)]
    held = [plan.max_in_flight(stage) for stage in range(num_stages)]
    more = f", {held[0]} instead of {num_stages} at the first stage" if any(config.slack) else ""
    if config.folded is not None:
        peaks = [config.folded.peak(process) / 2 for process in range(config.num_processes)]
        more = f", which is at most {max(peaks):g} on a whole process, where 1F1B-flush has {config.num_processes}"
    ahead = [f"{plan.mean_drift(stage):g}" for stage in range(num_stages)]
    return [
        f"schedule {config.schedule}: {num_stages} stages{where}, {a} micro-batches per update, drift of at most "
        f"{drift[0]} updates (by stage: {_row(drift)})",
        f"memory: activations of up to {held[0]} micro-batches in flight (by stage: {_row(held)}){more}; "
        f"{_weights(config.weight_policy, drift[0])}",
        *[f"look-ahead: forwards with the weights expected after so many more updates, by stage: {' '.join(ahead)}"]
        * config.look_ahead,
        clipping,
        *_choosing(config, a),
    ]


def _choosing(config: PaciConfig, a: int) -> list[str]:
    """What ``--paci-extra-in-flight auto`` may change."""
    if not config.extra.is_auto:
        return []
    lag = record_lag(config.num_stages, a)
    most = Plan(config.schedule, config.num_stages, a, even_slack(config.num_stages, config.extra.most))
    size = config.extra.most_bytes
    there = f" with {size / 1e9:.3g} GB of activations" if size is not None else ""
    return [
        f"--paci-extra-in-flight auto: after {config.extra.measured_updates(lag)} updates the pipeline drains once and "
        f"chooses by what was measured: at most {most.max_in_flight(0)} micro-batches in flight at the first stage{there}, "
        f"drift of at most {most.max_drift(0)} updates"
    ]


def _weights(policy: str, max_drift: int) -> str:
    match policy:
        case "stash":
            return f"the weights and up to {max_drift} older versions of them (--paci-weight-policy stash)"
        case "double-buffer":
            return "the weights and one older version of them (--paci-weight-policy double-buffer)"
        case _:
            return "one copy of the weights"


def _clipping(config: PaciConfig, clip_grad: float, lag: int) -> str:
    match config.clip_mode:
        case "none":
            return "none"
        case "stage":
            return f"to {clip_grad:g}, by each stage's own gradient norm"
        case _:
            return (
                f"to {clip_grad:g}, by the global norm of {lag} update{'s' if lag > 1 else ''} ago, what a stage knows of "
                "the current one, and at a drain the exact global norm"
            )


def _row(values: list[int]) -> str:
    return " ".join(map(str, values))
