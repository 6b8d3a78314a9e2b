"""Say what PACI and the schedules people would otherwise choose would give on a pipeline. See --help."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

# A checkout that is not installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paci_megatron.schedule.schedules import speedup_limit
from paci_megatron.simulate import peers
from paci_megatron.simulate.advice import Outcome, Scenario, advise, smallest_a
from paci_megatron.simulate.engine import Costs
from paci_megatron.simulate.peers import Schedule, find_schedule
from tools import schedule_study
from tools.pipeline_costs import add_costs_arguments, describe, read_costs, require
from tools.timelines import ENDINGS, check_ending, write_timelines
from tools.trace_report import TraceReport, describe_balance

DESCRIPTION = (
    "Simulates a pipeline under PACI and the other schedules: speed, bubble, memory, drift, and whether PACI helps."
)

EPILOG = """\
examples:
  plan_schedule.py --num-stages 8 --microbatches-per-update 4 8 16 --stage-ms 100:200
  plan_schedule.py --num-stages 4 --microbatches-per-update 8 --stage-ms 90:180 100:200 100:200 130:260 --latency-ms 5
  plan_schedule.py --metrics runs/metrics.jsonl --run-microbatches-per-update 8 --microbatches-per-update 8 16
  plan_schedule.py --num-stages 4 --microbatches-per-update 4 --stage-ms 100:200 --timeline schedules.html
  plan_schedule.py --trace runs/trace --timeline where_the_time_went.html
  plan_schedule.py --trace runs/trace --balance
  plan_schedule.py --study

A backward includes its weight gradients, half of it where --stage-ms does not say. Activations are counted in those of one
micro-batch on one stage. The bubble is the mean over the stages, from drain to drain.
"""

GIB = 2**30


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line, like everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="plan_schedule.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    size = parser.add_argument_group("pipeline")
    size.add_argument("--num-stages", type=int, metavar="N", help="default: as many as --stage-ms, --metrics or --trace has")
    size.add_argument(
        "--microbatches-per-update", type=int, nargs="+", metavar="A", help="one table for each (default: that of --trace)"
    )
    size.add_argument("--updates", type=int, default=100, help="updates between two drains (default: 100)")
    add_costs_arguments(parser)
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
    output.add_argument(
        "--study",
        type=int,
        nargs="*",
        metavar="N",
        help="print a study over numbers of stages instead, 8 to 512 if none given",
    )
    return parser


DEFAULT_SCHEDULES = ("1f1b", "interleaved:2", "zb-h1", "zb-2p", "pipedream-2bw", "pipedream", "paci", "paci:1")


def _choose(names: Sequence[str] | None, scenario: Scenario) -> list[Schedule]:
    """The schedules to compare. Of those not asked for by name, the ones that exist for this size."""
    n, a = scenario.num_stages, scenario.microbatches_per_update
    if names is None:
        slack = [f"paci:{n - 1}"] if n > 2 else []  # one more for each stage that follows
        return [s for s in map(find_schedule, [*DEFAULT_SCHEDULES, *slack]) if s.problem(n, a) is None]
    schedules = [find_schedule(name) for name in names]
    for schedule in schedules:
        problem = schedule.problem(n, a)
        require(problem is None, f"--schedules {problem}")
    return schedules


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for title, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([title.ljust(widths[0]), *right]))
    return lines


def table(outcomes: Sequence[Outcome], activation_bytes: float | None = None) -> str:
    """The outcomes for people, a line each; activations are those of the stage that holds most."""
    columns = ("micro-batches/s", "vs flush", "bubble", "activations", "extra weights", "max drift", "mean drift")
    rows = [("", *columns)]
    for outcome in outcomes:
        activations = max(outcome.peak_activations)
        memory = "" if activation_bytes is None else f" ({activations * activation_bytes / GIB:.3g} GiB)"
        rows.append(
            (
                outcome.title,
                f"{outcome.microbatches_per_s:.4g}",
                f"{outcome.speedup_vs_flush:.3f}x",
                f"{fmean(outcome.bubble_fraction):.1%}",
                f"{activations:.3g}{memory}",
                f"{max(outcome.extra_weight_copies)}",
                f"{max(outcome.max_drift)}",
                f"{fmean(outcome.mean_drift):.3f}",
            )
        )
    lines = _aligned(rows)
    late = [f"{o.title} {o.updates_late}" for o in outcomes if o.updates_late]
    if late:
        lines.append(f"Updates that gradients may be late, with older weights kept: {', '.join(late)}.")
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> None:
    require(bool(options.microbatches_per_update), "--microbatches-per-update is missing; give one or several, like 4 8 16")
    for a in options.microbatches_per_update:
        require(a >= 1, f"--microbatches-per-update {a}: give at least 1")
    for name in ("updates", "timeline_updates"):
        value = getattr(options, name)
        require(value >= 1, f"--{name.replace('_', '-')} {value}: give at least 1")
    if options.timeline is not None:
        check_ending(options.timeline)
        several = len(options.microbatches_per_update) > 1 and options.trace is None
        require(not several, "--timeline draws one number of micro-batches; give one --microbatches-per-update")


def plan(options: argparse.Namespace) -> None:
    """Print what the command line asks for."""
    for name in ("balance", "trace_iterations"):
        needs_trace = f"--{name.replace('_', '-')} needs --trace DIR, the folder of a run's --paci-trace-dir"
        require(options.trace is not None or not getattr(options, name), needs_trace)
    trace = TraceReport(options) if options.trace is not None else None
    if trace is not None and not options.microbatches_per_update:
        options.microbatches_per_update = [trace.stretch.microbatches_per_update]
    _check(options)
    if trace is not None and options.balance:
        found = trace.balance(options.num_stages, options.updates)
        print(json.dumps(found, indent=2) if options.json else describe_balance(found))
        return
    costs = read_costs(options, trace.costs if trace is not None else ())
    report: dict[str, Any] = {"num_stages": len(costs.stages), "smallest_a_for_drift_1": smallest_a(len(costs.stages))}
    if trace is not None:
        report["trace"] = {"iterations": [trace.first, trace.last], "stages": trace.figures(costs)}
        if not options.json:
            print("\n".join([trace.title(), "", *_aligned(trace.table(costs)), ""]))
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
    schedules = _choose(options.schedules, scenario)
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


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; 0, or 2 after one line on standard error that says what is wrong."""
    options = _parser().parse_args(argv)
    try:
        if options.study is not None:
            sizes = options.study or schedule_study.NUM_STAGES
            require(min(sizes) >= 2, f"--study {min(sizes)}: give at least 2 stages, one has no bubble")
            schedule_study.study(sizes)
        else:
            plan(options)
    except (ValueError, OSError) as error:
        print(f"plan_schedule.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plan_schedule.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
