"""What a pipeline's stages and links take, from a command line. For plan_schedule.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from paci_megatron.simulate.engine import Costs, StageCosts
from paci_megatron.telemetry.metrics_file import read_metrics


class PlanningError(ValueError):
    """A command line that cannot work; the message names the value, the constraint and the remedy."""


def require(condition: bool, message: str) -> None:
    """``PlanningError`` with that message unless the condition holds."""
    if not condition:
        raise PlanningError(message)


def add_costs_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`read_costs` reads."""
    costs = parser.add_argument_group("what everything takes")
    costs.add_argument(
        "--stage-ms",
        nargs="+",
        metavar="FORWARD:BACKWARD[:WEIGHT]",
        help="of one micro-batch, for all stages or one each; WEIGHT is the part of BACKWARD that computes weight gradients",
    )
    costs.add_argument("--metrics", type=Path, metavar="RUN.jsonl", help="take the stages' times from a run's metrics file")
    costs.add_argument("--trace", type=Path, metavar="DIR", help="take the stages' times from a run's --paci-trace-dir")
    costs.add_argument("--run-microbatches-per-update", type=int, metavar="A", help="what that run was made with")
    costs.add_argument("--update-ms", type=float, default=0, help="the optimizer step of a stage (default: 0)")
    costs.add_argument("--latency-ms", type=float, default=0, help="of a transfer between neighbours (default: 0)")
    costs.add_argument("--transfer-bytes", type=float, default=0, help="size of one activation between stages (default: 0)")
    costs.add_argument("--bandwidth-gb-per-s", type=float, help="of the link between neighbours (default: unlimited)")
    costs.add_argument("--jitter", type=float, default=0, help="every action takes 1 +- this share of its time (default: 0)")
    costs.add_argument("--seed", type=int, default=0, help="of the jitter (default: 0)")


def read_costs(options: argparse.Namespace, traced: tuple[StageCosts, ...] = ()) -> Costs:
    """The costs that the options describe. ``traced`` are the stages of ``--trace``."""
    for name in ("update_ms", "latency_ms", "transfer_bytes"):
        value = getattr(options, name)
        require(0 <= value < math.inf, f"--{name.replace('_', '-')} {value:g}: give a number of at least 0")
    bandwidth = options.bandwidth_gb_per_s
    require(
        bandwidth is None or bandwidth > 0,
        f"--bandwidth-gb-per-s {bandwidth}: give more than 0, or leave it out for no limit",
    )
    require(0 <= options.jitter < 1, f"--jitter {options.jitter:g}: give a share of the time, from 0 to below 1")
    return Costs(
        _stages(options, traced),
        latency_s=options.latency_ms / 1000,
        message_bytes=options.transfer_bytes,
        bandwidth_bytes_per_s=math.inf if bandwidth is None else bandwidth * 1e9,
        jitter=options.jitter,
        seed=options.seed,
    )


def parse_stage_ms(text: str, update_ms: float) -> StageCosts:
    """The costs of one stage from ``FORWARD:BACKWARD[:WEIGHT]``."""
    try:
        forward_s, backward_s, *rest = (float(part) / 1000 for part in text.split(":"))
        (weight_s,) = rest or [backward_s / 2]
    except ValueError:
        raise PlanningError(
            f"--stage-ms {text}: expected FORWARD:BACKWARD or FORWARD:BACKWARD:WEIGHT, like 100:200"
        ) from None
    positive = 0 < forward_s < math.inf and 0 < backward_s < math.inf
    require(positive, f"--stage-ms {text}: a forward and a backward take time; give milliseconds above 0")
    message = f"--stage-ms {text}: WEIGHT is a part of BACKWARD; give 0 to {backward_s * 1000:g}, or leave it out"
    require(0 <= weight_s <= backward_s, message)
    return StageCosts(forward_s, backward_s, weight_s, update_ms / 1000)


def measured_stages(path: Path, microbatches_per_update: int, update_ms: float) -> list[StageCosts]:
    """The stages' costs from the drains of a run, as far as its meters know them: each stage's computing time, of which a
    third is taken as forward. The first drain is left out if there are more: the stretch before it contains the start.
    """
    drains = [event["stages"] for event in read_metrics(path) if event.get("event") == "drain"]
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


def _stages(options: argparse.Namespace, traced: tuple[StageCosts, ...]) -> tuple[StageCosts, ...]:
    """The stages' costs from --stage-ms, --metrics or --trace, as many as --num-stages says."""
    sources = [name for name in ("stage_ms", "metrics", "trace") if getattr(options, name) is not None]
    require(len(sources) == 1, "--stage-ms, --metrics and --trace: give exactly one, it says what the stages take")
    stages: Sequence[StageCosts]
    if options.trace is not None:
        given = f"--update-ms {options.update_ms:g}: --trace has the time of an update; leave it out"
        require(options.update_ms == 0, given)
        stages = traced
    elif options.metrics is not None:
        a, planned = options.run_microbatches_per_update, options.microbatches_per_update
        several = (
            "--metrics with several --microbatches-per-update: say with --run-microbatches-per-update which the run had"
        )
        require(a is not None or len(planned) == 1, several)
        a = planned[0] if a is None else a
        require(a >= 1, f"--run-microbatches-per-update {a}: give at least 1")
        stages = measured_stages(options.metrics, a, options.update_ms)
    else:
        stages = [parse_stage_ms(text, options.update_ms) for text in options.stage_ms]
    n = len(stages) if options.num_stages is None else options.num_stages
    require(n >= 1, f"--num-stages {n}: give at least 1")
    if len(stages) == 1:
        stages = [stages[0]] * n
    source = f"--{sources[0].replace('_', '-')}"
    require(
        len(stages) == n, f"--num-stages {n}: {source} has {len(stages)} stages; give the times of {n}, or of one for all"
    )
    return tuple(stages)


def describe(costs: Costs) -> str:
    """The costs in one line."""

    def times(stage: StageCosts) -> str:
        ms = (stage.forward_s, stage.backward_s, stage.weight_gradient_s)
        return ":".join(f"{seconds * 1000:.4g}" for seconds in ms)

    stages = costs.stages
    each = "all " + times(stages[0]) if len(set(stages)) == 1 else " ".join(times(stage) for stage in stages)
    parts = [f"stages (forward:backward:weight gradients, ms): {each}"]
    for what, seconds in (
        ("update", stages[0].update_s),
        ("transfer latency", costs.latency_s),
        ("transfer on its link", costs.link_s),
    ):
        if seconds:
            parts.append(f"{what} {seconds * 1000:.4g} ms")
    return ", ".join(parts + ([f"jitter {costs.jitter:.0%}"] if costs.jitter else []))
