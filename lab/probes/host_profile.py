"""What a stage's process does on the host besides Megatron's own work, per update and per action, by a profile.

Takes the options below and those of pretrain_gpt_paci.py, under torchrun, one process a stage:

  torchrun --nproc-per-node 2 tools/profile_host.py --profile-output runs/profile.json --pipeline-schedule paci \\
      --pipeline-model-parallel-size 2 ...

Python's profiler counts every call, so what it shows is more than what it takes without.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

import paci_megatron
import pretrain_gpt_paci
from paci_megatron.runtime.executor import Executor

PACKAGE = str(Path(paci_megatron.__file__).parent)
# What runs for every action; the rest of the package runs once an update.
EACH_ACTION = tuple(
    f"{PACKAGE}/{module}.py"
    for module in (
        *(
            "schedule/actions",
            "schedule/schedules",
            "schedule/records",
            "runtime/executor",
            "runtime/links",
            "runtime/compute",
        ),
        *("runtime/state", "runtime/weights", "runtime/device", "runtime/meters", "runtime/readings", "platform/cpu"),
    )
)
# Where the process waits for another: the profiler does not see torch's own waiting, so it is that of the function it is
# in. And where torch takes a transfer over.
WAITING = ((f"{PACKAGE}/runtime/links.py", "receive"), ("distributed_c10d.py", "recv"))
TRANSFERS = (("distributed_c10d.py", "isend"), ("distributed_c10d.py", "irecv"))

Function = tuple[str, int, str]
"""File, line and name, as in pstats."""

Profile = dict[Function, tuple[int, int, float, float, dict[Function, tuple[int, int, float, float]]]]
"""Of each function calls, own and total seconds, and the same by caller."""


def classify(function: Function, caller: Function | None) -> str:
    """What the time in a function is spent on: action, update, transfer, waiting, or other (Megatron and torch).

    Functions that are not written in Python count to what calls them.
    """
    file, _, name = function
    if file == "~" and caller is not None:
        return classify(caller, None)
    for places, spent_on in ((WAITING, "waiting"), (TRANSFERS, "transfer")):
        if any(file.endswith(end) and name == called for end, called in places):
            return spent_on
    if file in EACH_ACTION:
        return "action"
    return "update" if file.startswith(PACKAGE) else "other"


def seconds_by_class(profile: Profile) -> dict[str, float]:
    """The seconds of a profile, by :func:`classify`."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for function, (_, _, own_s, _, callers) in profile.items():
        if function[0] == "~" and callers:
            for caller, (_, _, share_s, _) in callers.items():
                seconds[classify(function, caller)] += share_s
        else:
            seconds[classify(function, None)] += own_s
    return dict(seconds)


def figures(profile: Profile, actions: int, updates: int) -> dict[str, float]:
    """Milliseconds of the package's own code, and of the process's other time, for each action and each update."""
    seconds = seconds_by_class(profile)
    return {
        "actions": actions,
        "updates": updates,
        "own_ms_per_action": 1000 * seconds.get("action", 0.0) / actions,
        "own_ms_per_update": 1000 * seconds.get("update", 0.0) / updates,
        "transfer_ms_per_action": 1000 * seconds.get("transfer", 0.0) / actions,
        "megatron_ms_per_update": 1000 * seconds.get("other", 0.0) / updates,
        "waiting_ms_per_update": 1000 * seconds.get("waiting", 0.0) / updates,
    }


def _counted(run: Callable[[Executor], Any], counts: dict[str, int]) -> Callable[[Executor], Any]:
    """``Executor.run_to_update``, counting its actions and updates."""

    def run_to_update(executor: Executor) -> Any:
        plan = executor._plan

        def counted() -> Iterator[Any]:
            for action in plan:
                counts["actions"] += 1
                yield action

        if getattr(executor, "_counted", None) is None:
            executor._plan = counted()
            executor._counted = True  # type: ignore[attr-defined]
        result = run(executor)
        counts["updates"] += result is not None
        return result

    return run_to_update


def main() -> None:
    """Run the command line; rank 0 writes every stage's figures."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--profile-output", type=Path, required=True, help="where the JSON goes")
    options, sys.argv[1:] = parser.parse_known_args()
    paci_megatron.install()
    import megatron.training.training as training

    train, counts = training.train, {"actions": 0, "updates": 0}
    Executor.run_to_update = _counted(Executor.run_to_update, counts)  # type: ignore[method-assign, assignment]

    def profiled(*positional: Any, **named: Any) -> Any:
        profiler = cProfile.Profile()
        result = profiler.runcall(train, *positional, **named)
        mine = figures(pstats.Stats(profiler).stats, **counts)  # type: ignore[attr-defined]
        stages: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(stages, mine)
        if dist.get_rank() == 0:
            options.profile_output.parent.mkdir(parents=True, exist_ok=True)
            options.profile_output.write_text(json.dumps(stages, indent=2) + "\n", encoding="utf-8")
            for stage, row in enumerate(stages):
                print(f"stage {stage}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        return result

    training.train = profiled
    pretrain_gpt_paci.run()
