"""Measure schedules side by side on real processes: Megatron's 1F1B-flush and interleaved, and PACI. See --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lab.benchmark.jobs import Job
from lab.benchmark.rows import Measured, make_rows, ms_per_iteration, overrun_warning, table
from lab.benchmark.settings import (
    NAMES,
    REAL_MODEL,
    TIMED_MODEL,
    Case,
    Settings,
    parse_stage_ms,
)
from paci_megatron.cli.parser import CommandParser
from paci_megatron.usage import UsageError, require

if TYPE_CHECKING:
    from lab.benchmark.launch import Launcher

DESCRIPTION = (
    "Trains the same small GPT with each schedule, on one process a stage, and measures throughput in steady state, between "
    "the pipeline's fill and drain. What is measured is what users get: pretrain_gpt_paci.py with clipping by the global "
    "norm, a log line every iteration, and meters."
)

EPILOG = f"""\
examples:
  benchmark_throughput.py --schedules 1f1b paci interleaved:2 --num-stages 8 --microbatches-per-update 4 8 16 \\
      --timed-stage-ms 100:200 --output runs/throughput.json
  benchmark_throughput.py --schedules 1f1b paci --num-stages 2 --microbatches-per-update 1 2 4 --output runs/real.json

schedules: {NAMES}
paci-bare is PACI without clipping and without the records that stages send each other, to see what these cost.

With --timed-stage-ms a stage's forward and backward of a micro-batch are padded to the given time by sleeping, so that many
stages can be studied on few cores. Without, compute is real, and each stage needs a core or GPU of its own.
Flags after a lone -- go to every training: ... -- --bf16 --attention-backend flash
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("benchmark_throughput.py", DESCRIPTION, EPILOG)
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "paci"], metavar="NAME", help="default: 1f1b paci")
    parser.add_argument("--num-stages", nargs="+", type=int, required=True, metavar="N", help="pipeline stages")
    parser.add_argument("--microbatches-per-update", nargs="+", type=int, required=True, metavar="A")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="rows; a .png is written beside it")
    parser.add_argument("--iterations", type=int, default=30, help="measured in each training (default: 30)")
    parser.add_argument(
        "--warmup", type=int, help="iterations before them (default: what fills the pipeline twice, at least 3)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="trainings of each kind, in turns (default: 2)")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for one training (default: 1800)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured, and about how long it takes")
    timed = parser.add_argument_group("timed stages")
    timed.add_argument(
        "--timed-stage-ms", nargs="+", metavar="FORWARD:BACKWARD", help="of a micro-batch, for all stages or one each"
    )
    timed.add_argument("--jitter", type=float, default=0, help="every action takes 1 +- this share of its time (default: 0)")
    timed.add_argument("--seed", type=int, default=0, help="of the jitter (default: 0)")
    timed.add_argument(
        "--straggler",
        type=_straggler,
        metavar="STAGE:FACTOR:ITERATIONS",
        help="a stage, from 0, that takes so many times as long in so many of the measured iterations, those in the "
        "middle; what is predicted is without it",
    )
    model = parser.add_argument_group("model", "tiny with timed stages, tens of milliseconds a micro-batch without")
    for field in dataclasses.fields(TIMED_MODEL):
        model.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    return parser


def _straggler(text: str) -> tuple[int, float, int]:
    stage, factor, iterations = text.split(":")
    return int(stage), float(factor), int(iterations)


def _settings(options: argparse.Namespace, megatron_flags: Sequence[str]) -> Settings:
    """The benchmark that the options describe."""
    stage_ms = None if options.timed_stage_ms is None else tuple(map(parse_stage_ms, options.timed_stage_ms))
    model = TIMED_MODEL if stage_ms else REAL_MODEL
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(model)}
    for name, value in given.items():
        require(value is None or value >= 1, f"--{name.replace('_', '-')} {value}: give at least 1")
    settings = Settings(
        schedules=tuple(options.schedules),
        num_stages=tuple(options.num_stages),
        microbatches_per_update=tuple(options.microbatches_per_update),
        model=dataclasses.replace(model, **{name: value for name, value in given.items() if value is not None}),
        stage_ms=stage_ms,
        jitter=options.jitter,
        straggler=options.straggler,
        seed=options.seed,
        iterations=options.iterations,
        warmup=options.warmup,
        repeats=options.repeats,
        megatron_flags=tuple(megatron_flags),
    )
    settings.check()
    return settings


def measurements(settings: Settings, groups: Sequence[Sequence[Case]]) -> Iterator[tuple[Case, int]]:
    """What is measured, in order: each case's memory, repeat 0, then its times. Within a group schedules take turns, the
    other way round in every second repeat, so that what the machine does meanwhile meets all alike. The memory of
    paci:auto is left out: it would choose otherwise in so short a training.
    """
    for group in groups:
        yield from ((case, 0) for case in group if not case.arm.is_auto)
        for repeat in range(1, settings.repeats + 1):
            yield from ((case, repeat) for case in (group if repeat % 2 else reversed(group)))


def estimated_s(settings: Settings, case: Case, repeat: int, cores: int) -> float:
    """About how long a measurement takes: starting its processes, and with timed stages what the simulator says."""
    start_s = 4 + 4 * case.num_stages / min(cores, case.num_stages)
    costs = settings.timed_costs(case.num_stages)
    return start_s + (settings.simulate(case, costs).makespan_s if repeat and costs is not None else 0)


def make_job(settings: Settings, case: Case, repeat: int, logs: Path) -> Job:
    """The training of a measurement."""
    metrics_file = str(logs / "metrics.jsonl")
    a = case.microbatches_per_update
    if repeat == 0:
        argv = settings.training_arguments(case, metrics_file, train_iters=case.drain_iterations + 1)
        return Job(tuple(argv), a, is_bare=case.arm.is_bare, measures_memory=True)
    argv, times = settings.training_arguments(case, metrics_file), settings.stage_times(case)
    return Job(tuple(argv), a, settings.warmup_of(case), settings.iterations, times, case.arm.is_bare)


def measure(
    settings: Settings, groups: Sequence[Sequence[Case]], launcher: Launcher, output: Path, timeout_s: float
) -> None:
    """Make all measurements, and write the rows after each."""
    measured = {case: Measured(case) for group in groups for case in group}
    plan = list(measurements(settings, groups))
    begin_s = time.monotonic()
    for index, (case, repeat) in enumerate(plan):
        name = "memory" if repeat == 0 else f"repeat-{repeat}"
        logs = output.with_suffix(".logs") / case.slug / name
        logs.mkdir(parents=True, exist_ok=True)
        (logs / "metrics.jsonl").unlink(missing_ok=True)  # a training appends to it
        ranks = launcher.run(case.num_stages, make_job(settings, case, repeat, logs), logs, timeout_s)
        if repeat == 0:
            measured[case].memory = ranks
            found = f"peak activations {max(rank.peak_activation_bytes for rank in ranks) / 1e6:.2f} MB"
        else:
            measured[case].repeats.append(ranks)
            warmup = settings.warmup_of(case)
            found = f"{ms_per_iteration(ranks, warmup, settings.iterations):.1f} ms per iteration"
        _write(output, make_rows(settings, list(measured.values())))
        print(f"[{index + 1}/{len(plan)}, {time.monotonic() - begin_s:.0f} s] {case}, {name}: {found}", flush=True)


def _write(output: Path, rows: object) -> None:
    """Write at once or not at all: an interruption leaves the rows before."""
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, output)


def _show(output: Path) -> None:
    """Print the rows of the file as a table, and draw them."""
    from lab.benchmark.figure import write_figure

    rows = json.loads(output.read_text(encoding="utf-8"))
    if not rows:
        return
    print(f"\n{table(rows)}\n")
    for warning in filter(None, map(overrun_warning, rows)):
        print(warning)
    figure = output.with_suffix(".png")
    write_figure(rows, figure)
    print(f"{output}\n{figure}")


def _dry_run(settings: Settings, groups: Sequence[Sequence[Case]]) -> None:
    total_s, cores = 0.0, _cores()
    for case, repeat in measurements(settings, groups):
        seconds = estimated_s(settings, case, repeat, cores)
        total_s += seconds
        what = "memory" if repeat == 0 else f"repeat {repeat}, {settings.train_iters(case)} iterations"
        print(f"{case}, {what}: about {seconds:.0f} s")
    without = "" if settings.stage_ms is not None else ", and what the model computes"
    print(f"in all about {total_s / 60:.0f} min{without}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher(settings: Settings) -> Launcher:
    """Processes on the GPUs if there are enough, on the CPU otherwise, with a line that says so."""
    import torch

    from lab.benchmark.launch import Launcher

    stages, devices, cores = max(settings.num_stages), torch.accelerator.device_count(), _cores()
    on_cpu = devices < stages
    print(f"{devices} GPUs, {cores} cores, up to {stages} stages: on the {'CPU' if on_cpu else 'GPUs'}", flush=True)
    if on_cpu and settings.stage_ms is None and cores < stages:
        print(f"warning: {stages} stages share {cores} cores, so no schedule can be faster than another")
    return Launcher(on_cpu)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 if a training failed, 2 if it cannot work, 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:at])
    try:
        settings = _settings(options, arguments[at + 1 :])
        groups, notes = settings.groups()
        require(bool(groups), "nothing to measure: " + "; ".join(notes))
    except UsageError as error:
        parser.error(str(error))
    for note in notes:
        print(f"not measured: {note}")
    if options.dry_run:
        _dry_run(settings, groups)
        return 0
    signal.signal(signal.SIGTERM, _terminated)
    output = options.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, [])
    try:
        measure(settings, groups, _launcher(settings), output, options.timeout_s)
    except KeyboardInterrupt:
        print("\nbenchmark_throughput.py: interrupted; what is finished is kept", file=sys.stderr)
        _show(output)
        return 130
    except RuntimeError as error:
        print(f"benchmark_throughput.py: error: {error}", file=sys.stderr)
        _show(output)
        return 1
    _show(output)
    return 0
