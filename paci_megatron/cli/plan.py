"""``paci-megatron plan``: what PACI and the schedules people would otherwise choose would give on a pipeline. See --help."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from paci_megatron.schedule.schedules import speedup_limit
from paci_megatron.simulate import peers
from paci_megatron.simulate.advice import Scenario, advise, smallest_a
from paci_megatron.simulate.comparison import aligned, choose_schedules, table
from paci_megatron.simulate.costs import Costs, StageCosts, describe, parse_stage_ms
from paci_megatron.telemetry.stage_times import measured_stages, run_microbatches
from paci_megatron.telemetry.timelines import ENDINGS, check_ending, write_timelines
from paci_megatron.telemetry.trace_report import TraceReport, describe_balance
from paci_megatron.usage import require, require_writable

from .parser import CommandParser

DESCRIPTION = (
    "Simulates a pipeline under PACI and the other schedules: speed, bubble, memory, drift, and whether PACI helps."
)

EPILOG = """\
examples:
  %(prog)s --num-stages 8 --microbatches-per-update 4 8 16 --stage-ms 100:200
  %(prog)s --num-stages 4 --microbatches-per-update 8 --stage-ms 90:180 100:200 100:200 130:260 --latency-ms 5
  %(prog)s --metrics runs/metrics.jsonl --microbatches-per-update 8 16
  %(prog)s --num-stages 4 --microbatches-per-update 4 --stage-ms 100:200 --timeline schedules.html
  %(prog)s --trace runs/trace --timeline where_the_time_went.html
  %(prog)s --trace runs/trace --balance

A backward includes its weight gradients, half of it where --stage-ms does not say. Activations are counted in those of one
micro-batch on one stage. The bubble is the mean over the stages, from drain to drain.
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog, DESCRIPTION, EPILOG)
    size = parser.add_argument_group("pipeline")
    size.add_argument("--num-stages", type=int, metavar="N", help="default: as many as --stage-ms, --metrics or --trace has")
    size.add_argument(
        "--microbatches-per-update", type=int, nargs="+", metavar="A", help="one table for each (default: that of --trace)"
    )
    size.add_argument("--updates", type=int, default=100, help="updates between two drains (default: 100)")
    _add_costs_arguments(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--activation-bytes", type=float, help="what a stage keeps of one micro-batch, to show GiB")
    output.add_argument("--schedules", nargs="+", metavar="NAME", help=f"which to compare: {peers.NAMES}")
    output.add_argument(
        "--timeline", type=Path, metavar="FILE", help=f"picture of the schedules, or of --trace: {', '.join(ENDINGS)}"
    )
    output.add_argument("--timeline-updates", type=int, default=3, help="updates in the picture (default: 3)")
    output.add_argument(
        "--trace-iterations", metavar="FROM:TO", help="of --trace (default: the longest stretch without drain)"
    )
    output.add_argument(
        "--balance", action="store_true", help="print the layout that balances the stages of --trace instead"
    )
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _add_costs_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`_read_costs` reads."""
    costs = parser.add_argument_group("what everything takes")
    costs.add_argument(
        "--stage-ms",
        nargs="+",
        metavar="FORWARD:BACKWARD[:WEIGHT]",
        help="of one micro-batch, for all stages or one each; WEIGHT is the part of BACKWARD that computes weight gradients",
    )
    costs.add_argument("--metrics", type=Path, metavar="RUN.jsonl", help="take the stages' times from a run's metrics file")
    costs.add_argument("--trace", type=Path, metavar="DIR", help="take the stages' times from a run's --paci-trace-dir")
    costs.add_argument(
        "--run-microbatches-per-update",
        type=int,
        metavar="A",
        help="what that run was made with (default: what its file says)",
    )
    costs.add_argument("--update-ms", type=float, default=0, help="the optimizer step of a stage (default: 0)")
    costs.add_argument(
        "--latency-ms", type=float, nargs="+", default=[0], help="of a transfer, for all links or one each (default: 0)"
    )
    costs.add_argument("--transfer-bytes", type=float, default=0, help="size of one activation between stages (default: 0)")
    costs.add_argument("--bandwidth-gb-per-s", type=float, nargs="+", help="of all links, or one each (default: unlimited)")
    costs.add_argument("--jitter", type=float, default=0, help="every action takes 1 +- this share of its time (default: 0)")
    costs.add_argument("--seed", type=int, default=0, help="of the jitter (default: 0)")


def _read_costs(options: argparse.Namespace, traced: tuple[StageCosts, ...] = ()) -> Costs:
    """The costs that the options describe. ``traced`` are the stages of ``--trace``."""
    for name, values in (
        ("update-ms", [options.update_ms]),
        ("transfer-bytes", [options.transfer_bytes]),
        ("latency-ms", options.latency_ms),
    ):
        for value in values:
            require(0 <= value < math.inf, f"--{name} {value:g}: give a number of at least 0")
    bandwidths = options.bandwidth_gb_per_s or [math.inf]
    for value in bandwidths:
        require(value > 0, f"--bandwidth-gb-per-s {value}: give more than 0, or leave it out for no limit")
    stages = _stages(options, traced)
    for name, values in (("latency-ms", options.latency_ms), ("bandwidth-gb-per-s", bandwidths)):
        message = (
            f"--{name} has {len(values)} links; {len(stages)} stages have {len(stages) - 1}: give as many, or one for all"
        )
        require(len(values) in (1, len(stages) - 1), message)
    require(0 <= options.jitter < 1, f"--jitter {options.jitter:g}: give a share of the time, from 0 to below 1")
    return Costs(
        stages,
        latency_s=_by_link(options.latency_ms, 1e-3),
        message_bytes=options.transfer_bytes,
        bandwidth_bytes_per_s=_by_link(bandwidths, 1e9),
        handshakes=any(options.latency_ms),
        jitter=options.jitter,
        seed=options.seed,
    )


def _by_link(values: Sequence[float], unit: float) -> float | tuple[float, ...]:
    return values[0] * unit if len(values) == 1 else tuple(value * unit for value in values)


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
        a = run_microbatches(options.metrics) if a is None else a
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


def _check(options: argparse.Namespace) -> None:
    require(bool(options.microbatches_per_update), "--microbatches-per-update is missing; give one or several, like 4 8 16")
    for a in options.microbatches_per_update:
        require(a >= 1, f"--microbatches-per-update {a}: give at least 1")
    size = options.activation_bytes
    require(size is None or 0 <= size < math.inf, f"--activation-bytes {size}: give a number of at least 0")
    for name in ("updates", "timeline_updates"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} {value}: give at least 1")
    if options.timeline is not None:
        check_ending(options.timeline)
        require_writable("--timeline", options.timeline, makes_folder=True)
        several = len(options.microbatches_per_update) > 1 and options.trace is None
        require(not several, "--timeline draws one number of micro-batches; give one --microbatches-per-update")


def plan(options: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    for name in ("balance", "trace_iterations"):
        needs_trace = f"--{name.replace('_', '-')} needs --trace DIR, the folder of a run's --paci-trace-dir"
        require(options.trace is not None or not getattr(options, name), needs_trace)
    trace = TraceReport(options.trace, options.trace_iterations) if options.trace is not None else None
    if trace is not None and not options.microbatches_per_update:
        options.microbatches_per_update = [trace.stretch.microbatches_per_update]
    _check(options)
    if trace is not None and options.balance:
        found = trace.balance(options.num_stages, options.updates)
        print(json.dumps(found, indent=2) if options.json else describe_balance(found))
        return
    costs = _read_costs(options, trace.costs if trace is not None else ())
    report: dict[str, Any] = {"num_stages": len(costs.stages), "smallest_a_for_drift_1": smallest_a(len(costs.stages))}
    if trace is not None:
        report["trace"] = {"iterations": [trace.first, trace.last], "stages": trace.figures(costs)}
        if not options.json:
            print("\n".join([trace.title(), "", *aligned(trace.table(costs)), ""]))
        if options.timeline is not None:
            shown = trace.draw(options.timeline, costs, None if options.trace_iterations else options.timeline_updates)
            print(f"written: {options.timeline}, {shown}", file=sys.stderr)
    report["plans"] = [_plan_for(a, costs, options) for a in options.microbatches_per_update]
    if options.json:
        print(json.dumps(report, indent=2))


def _plan_for(a: int, costs: Costs, options: argparse.Namespace) -> dict[str, Any]:
    """What the schedules give with ``a`` micro-batches per update. Printed, unless it is to be JSON, and drawn."""
    n = len(costs.stages)
    scenario = Scenario(a, options.updates, costs)
    schedules = choose_schedules(options.schedules, scenario)
    outcomes = [scenario.outcome(schedule) for schedule in schedules]
    advice = advise(scenario, outcomes)
    if not options.json:
        print(f"{n} stages, {a} micro-batches per update, a drain every {options.updates} updates")
        print(f"{describe(costs)}\n\n{table(outcomes, options.activation_bytes)}\n")
        print("\n".join(advice) + "\n")
    if options.timeline is not None and options.trace is None:
        drawn = replace(scenario, updates=options.timeline_updates)
        write_timelines(options.timeline, {s.title: [r.spans for r in drawn.simulate(s, True).stages] for s in schedules})
        print(f"written: {options.timeline}", file=sys.stderr)
    return {
        "microbatches_per_update": a,
        "speedup_limit": speedup_limit(n, a),
        "schedules": [asdict(outcome) for outcome in outcomes],
        "advice": advice,
    }


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    prog = prog or "paci-megatron plan"
    options = _parser(prog).parse_args(argv)
    try:
        plan(options)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
