"""The study of many stages, with jitter and latency: the share of the time they compute. See --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.peers import find_schedule

NUM_STAGES = (8, 16, 32, 64, 128, 256, 512)
SCHEDULES = ("1f1b", "interleaved:2", "zb-h1", "paci", "paci:N-1")
SLACK_TITLE = "PACI, k=N-1"
SETTINGS = ((0.0, 0.0), (0.2, 0.0), (0.0, 0.05), (0.2, 0.05))
"""Jitter, and latency as a share of a micro-batch's forward and backward."""

STAGE = StageCosts(forward_s=0.1, backward_s=0.2)
FILL_UPDATES = DRAIN_UPDATES = 3
MEASURED_MICROBATCHES = 1024


def computing(name: str, num_stages: int, jitter: float, latency: float) -> float:
    """The share of the time that stages compute in steady state, with N micro-batches per update on N stages.

    ``paci:N-1`` is PACI with so many more in flight, which is one for each stage that follows.
    """
    work_s = STAGE.forward_s + STAGE.backward_s
    costs = Costs((STAGE,) * num_stages, latency_s=latency * work_s, jitter=jitter)
    measured = max(3, MEASURED_MICROBATCHES // num_stages)
    schedule = find_schedule(name.replace("N-1", str(num_stages - 1)))
    run = schedule.simulate(num_stages, FILL_UPDATES + measured + DRAIN_UPDATES, costs)
    return run.microbatches_per_s(FILL_UPDATES, FILL_UPDATES + measured) * work_s


def study(all_num_stages: Sequence[int]) -> None:
    """Print a Markdown table, a row for each number of stages and setting."""
    columns = [
        "N",
        "jitter",
        "latency",
        *(SLACK_TITLE if name == "paci:N-1" else find_schedule(name).title for name in SCHEDULES),
        "PACI / 1F1B-flush",
        "(a+N-1)/a",
    ]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for num_stages in all_num_stages:
        for jitter, latency in SETTINGS:
            shares = {name: computing(name, num_stages, jitter, latency) for name in SCHEDULES}
            cells = [f"{num_stages}", f"{jitter:.0%}", f"{latency:.0%}", *(f"{share:.1%}" for share in shares.values())]
            cells += [f"{shares['paci'] / shares['1f1b']:.2f}", f"{(2 * num_stages - 1) / num_stages:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None, prog: str = "plan_schedule.py") -> int:
    """Run ``--study [N ...]``; 0, or 2 after one line on standard error that says what is wrong."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--study", type=int, nargs="*", metavar="N", help="numbers of stages (default: 8 to 512)")
    sizes = parser.parse_args(argv).study or NUM_STAGES
    if min(sizes) < 2:
        print(f"{prog}: error: --study {min(sizes)}: give at least 2 stages, one has no bubble", file=sys.stderr)
        return 2
    try:
        study(sizes)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    return 0
