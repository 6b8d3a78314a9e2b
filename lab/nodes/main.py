"""Measure schedules on several nodes with slow links between them, beside what the simulator foretells. See --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.benchmark.jobs import RankResult
from lab.benchmark.main import make_job
from lab.benchmark.rows import ms_per_iteration
from lab.benchmark.settings import FLUSH, TIMED_MODEL, Case, Settings, parse_stage_ms
from paci_megatron.cli.parser import CommandParser
from paci_megatron.simulate.comparison import aligned
from paci_megatron.simulate.costs import Costs
from paci_megatron.usage import UsageError, require

from .figure import write_figure
from .namespaces import nodes, unavailable
from .training import TrainingError, train

DESCRIPTION = (
    "Trains a small GPT with each schedule on nodes of this machine, network namespaces with a link of the given delay and "
    "rate between them, by torchrun with a rendezvous, and prints what it took beside what the simulator foretells. Needs "
    "root and /dev/net/tun."
)

EPILOG = """\
examples:
  benchmark_nodes.py --schedules 1f1b interleaved:2 paci paci:1 paci:2 paci:4 paci:auto --microbatches-per-update 4 \\
      --delay-ms 0 1 5 20 50 --gbit-per-s 10 --timed-stage-ms 30:60 --output runs/nodes.json

--delay-ms is each way, of every link between nodes. Stages are timed: they sleep for what computing leaves of the
given time. Flags after a lone -- go to every training.
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("benchmark_nodes.py", DESCRIPTION, EPILOG)
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--stages-per-node", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "paci"], metavar="NAME", help="default: 1f1b paci")
    parser.add_argument("--microbatches-per-update", type=int, default=4, metavar="A", help="default: 4")
    parser.add_argument("--delay-ms", nargs="+", type=float, default=[20.0], metavar="MS", help="default: 20")
    parser.add_argument("--gbit-per-s", nargs="+", type=float, default=[10.0], metavar="RATE", help="default: 10")
    parser.add_argument("--timed-stage-ms", nargs="+", default=["30:60"], metavar="FORWARD:BACKWARD", help="default: 30:60")
    parser.add_argument(
        "--jitter", type=float, default=0, help="every action takes 1 +- this share of its time (default: 0)"
    )
    parser.add_argument("--iterations", type=int, default=10, help="measured in each training (default: 10)")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="rows, added to those that are there; the table has medians",
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="time of an iteration by delay, of all rows")
    parser.add_argument("--timeout-s", type=float, default=300, help="for one training (default: 300)")
    for field in ("seq_length", "micro_batch_size"):
        default = getattr(TIMED_MODEL, field)
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    return parser


def settings_of(options: argparse.Namespace, megatron_flags: Sequence[str]) -> Settings:
    """What the options describe, but for the network."""
    for name in ("nodes", "stages_per_node", "seq_length", "micro_batch_size"):
        require(getattr(options, name) >= 1, f"--{name.replace('_', '-')} {getattr(options, name)}: give at least 1")
    for name, values in (("delay-ms", options.delay_ms), ("gbit-per-s", options.gbit_per_s)):
        least = 0 if name == "delay-ms" else 1e-6
        require(all(value >= least for value in values), f"--{name} {values}: give numbers of at least {least:g}")
    model = dataclasses.replace(TIMED_MODEL, seq_length=options.seq_length, micro_batch_size=options.micro_batch_size)
    settings = Settings(
        schedules=tuple(options.schedules),
        num_stages=(options.nodes * options.stages_per_node,),
        microbatches_per_update=(options.microbatches_per_update,),
        model=model,
        stage_ms=tuple(map(parse_stage_ms, options.timed_stage_ms)),
        jitter=options.jitter,
        iterations=options.iterations,
        repeats=1,
        megatron_flags=("--distributed-timeout-minutes", "2", "--log-interval", "1000", *megatron_flags),
    )
    settings.check()
    return settings


def costs_over(settings: Settings, stages_per_node: int, delay_s: float, bits_per_s: float) -> Costs:
    """What the stages and the links take: those between nodes what they are told to, those within a node nothing."""
    (num_stages,) = settings.num_stages
    costs, model = settings.timed_costs(num_stages), settings.model
    assert costs is not None
    element_bytes = 2 if {"--bf16", "bf16"} & set(settings.megatron_flags) else 4  # also --paci-transfer-dtype bf16
    message_bytes = model.seq_length * model.micro_batch_size * model.hidden_size * element_bytes
    between = [(stage + 1) % stages_per_node == 0 for stage in range(num_stages - 1)]
    return dataclasses.replace(
        costs,
        latency_s=tuple(delay_s if slow else 0.0 for slow in between),
        message_bytes=message_bytes,
        handshakes=True,
        bandwidth_bytes_per_s=tuple(bits_per_s / 8 if slow else math.inf for slow in between),
    )


def row(
    settings: Settings, case: Case, costs: Costs, ranks: Sequence[RankResult], network: dict[str, float]
) -> dict[str, Any]:
    """What was measured of a case beside its prediction, for which updates take what they took."""
    stages = [dataclasses.replace(stage, update_s=rank.update_s) for stage, rank in zip(costs.stages, ranks, strict=True)]
    costs = dataclasses.replace(costs, stages=tuple(stages))
    measured = ms_per_iteration(ranks, settings.warmup_of(case), settings.iterations)
    tokens = case.microbatches_per_update * settings.model.micro_batch_size * settings.model.seq_length
    predicted = 1000 * tokens / settings.predicted_tokens_per_second(case, costs, ranks[0].slack)
    return {
        "schedule": case.arm.name,
        "num_stages": case.num_stages,
        "microbatches_per_update": case.microbatches_per_update,
        **network,
        "ms_per_iteration": measured,
        "predicted_ms": predicted,
        "error": predicted / measured - 1,
        "slack": ranks[0].slack,
        "max_drift": max(rank.max_drift for rank in ranks),
        "overruns": sum(rank.overruns for rank in ranks) / max(sum(rank.actions for rank in ranks), 1),
        "megatron_flags": list(settings.megatron_flags),
    }


def medians(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of each schedule and network the one in the middle."""
    repeats: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in rows:
        repeats.setdefault((one["schedule"], *_network(one)), []).append(one)
    return [sorted(same, key=lambda one: float(one["ms_per_iteration"]))[len(same) // 2] for same in repeats.values()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader, of those of one case the median; speed-ups are over 1F1B-flush on the same network."""
    rows = medians(rows)
    flush = {_network(one): one for one in rows if one["schedule"] == FLUSH}
    header = ("", "delay ms", "Gbit/s", "ms/iteration", "predicted", "error", "vs flush", "predicted", "slack", "drift")
    lines = [header]
    for one in rows:
        base = flush.get(_network(one))
        speedups = ["-", "-"] if base is None else [f"{base[k] / one[k]:.2f}x" for k in ("ms_per_iteration", "predicted_ms")]
        numbers = (f"{one['delay_ms']:g}", f"{one['gbit_per_s']:g}", f"{one['ms_per_iteration']:.1f}")
        error = f"{one['error']:+.1%}"
        slack = ",".join(map(str, one["slack"])) or "-"
        lines.append(
            (one["schedule"], *numbers, f"{one['predicted_ms']:.1f}", error, *speedups, slack, str(one["max_drift"]))
        )
    return "\n".join(aligned(lines))


def _network(one: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(one[key] for key in ("num_stages", "microbatches_per_update", "delay_ms", "gbit_per_s"))


def measure(options: argparse.Namespace, settings: Settings) -> list[dict[str, Any]]:
    """Make all measurements; the file has the rows after each, with those that it had."""
    output: Path = options.output
    rows = json.loads(output.read_text(encoding="utf-8")) if output.exists() else []
    ((group,), notes) = settings.groups()
    for note in notes:
        print(f"left out: {note}")
    for bits_per_s, delay_s in ((1e9 * rate, ms / 1000) for rate in options.gbit_per_s for ms in options.delay_ms):
        costs = costs_over(settings, options.stages_per_node, delay_s, bits_per_s)
        network = {"delay_ms": 1000 * delay_s, "gbit_per_s": bits_per_s / 1e9}
        with nodes([delay_s] * (options.nodes - 1), bits_per_s) as made:
            for case in group:
                begin_s = time.monotonic()
                folder = output.with_suffix(".logs") / f"{case.slug}-{1000 * delay_s:g}ms-{bits_per_s / 1e9:g}gbit"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "metrics.jsonl").unlink(missing_ok=True)
                job = make_job(settings, case, 1, folder)
                ranks = train(job, made, options.stages_per_node, folder.resolve(), options.timeout_s)
                rows.append(row(settings, case, costs, ranks, network))
                output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                found = f"{rows[-1]['ms_per_iteration']:.1f} ms an iteration, {rows[-1]['predicted_ms']:.1f} foretold"
                print(f"{case}, {network}: {found} ({time.monotonic() - begin_s:.0f} s)", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line that says what is wrong."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    try:
        reason = unavailable()
        require(reason is None, f"no nodes can be made here: {reason}")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        rows = measure(options, settings_of(options, words[split + 1 :]))
        print(table(rows))
        if options.figure is not None:
            write_figure(medians(rows), options.figure)
    except (UsageError, TrainingError, RuntimeError) as error:
        print(f"benchmark_nodes.py: error: {error}", file=sys.stderr)
        return 2
    return 0
