"""Metrics files and traces like those of real runs, for what is made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paci_megatron.schedule import Kind, one_f_one_b_flush, paci
from paci_megatron.schedule.schedules import flush_bubble_fraction, max_drift
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import simulate
from paci_megatron.telemetry.trace_file import trace_path

N, A, ITERATIONS, LOG, EVAL = 4, 4, 48, 4, 16
TOKENS = 4096  # an iteration's
STAGE = StageCosts(0.010, 0.020, update_s=0.002)
SECONDS = {"1f1b": (A + N - 1) * 0.030 + 0.002, "paci": A * 0.030 + 0.004}
"""An iteration's."""


def header(schedule: str, after: int = 0, **changed: Any) -> dict[str, Any]:
    """What a process says first that starts after ``after`` iterations."""
    fields = {
        **{
            "schedule": schedule,
            "iteration": after,
            "num_stages": N,
            "chunks_per_stage": 1,
            "emulated": False,
            "microbatches_per_update": A,
        },
        **{"slack": [], "weight_policy": "latest", "clip_grad": 1.0, "clip_mode": "global", "micro_batch_size": 8},
        **{"seq_length": 128, "data_parallel_size": 1, "tensor_model_parallel_size": 1, "context_parallel_size": 1},
        **{"train_iters": ITERATIONS, "trace_dir": None, "device": "CPU", "folder": "/home/me/runs"},
        "command": f"torchrun --nproc-per-node {N} pretrain_gpt_paci.py --lr 1e-3 --pipeline-schedule {schedule}",
        "versions": {"paci-megatron": "0.1.0", "megatron-core": "0.19.2", "torch": "2.11.0"},
        "set_up": [
            "layers: local (Transformer Engine is not installed)",
            "--rerun-mode is off under paci: it keeps every batch",
        ],
    }
    return {"event": "run", **fields, **changed}


def loss_of(iteration: int, schedule: str = "paci") -> float:
    """A loss that falls, a little differently under each schedule."""
    return 3.0 + 5.0 * math.exp(-iteration / 12) + (0.01 if schedule == "paci" else 0.0)


def training(schedule: str, begin: int = 0, end: int = ITERATIONS, **changed: Any) -> list[dict[str, Any]]:
    """The events of a process that trains iterations ``begin`` + 1 to ``end``."""
    events = [header(schedule, begin, **changed)]
    for at in range(begin + 1, end + 1):
        train_s = (at - begin) * SECONDS[schedule]
        position = {"schedule": schedule, "iteration": at, "tokens": at * TOKENS, "train_s": train_s, "time_s": train_s + 1}
        if at % EVAL == 0 or at == end:
            events += [_drain(schedule, at, EVAL if at % EVAL == 0 else at % EVAL), _memory(at, schedule)]
        if at % LOG == 0:
            figures = {"loss": loss_of(at, schedule), "ms_per_iteration": 1000 * SECONDS[schedule], "iterations": LOG}
            events.append({"event": "train", **position, **figures, "grad_norm": 4 / at, "grad_norm_iteration": at - 2})
        if at % EVAL == 0:
            loss = loss_of(at, schedule) + 0.1
            events.append({"event": "evaluation", **position, "prefix": "", "loss": loss, "perplexity": math.exp(loss)})
    return events


def _drain(schedule: str, iteration: int, updates: int) -> dict[str, Any]:
    bubble = flush_bubble_fraction(N, A) + 0.02 if schedule == "1f1b" else 0.08
    stages = [
        {
            **{"stage_index": stage, "updates": updates, "skipped_updates": int(stage == 1 and iteration == EVAL)},
            **{"max_drift": max_drift(stage, N, A) if schedule == "paci" else 0, "max_in_flight": N - stage},
            **{"mean_drift": (N - 1 - stage) / A if schedule == "paci" else 0.0, "bubble_fraction": bubble + stage / 100},
            **{"host_bound_fraction": 0.0, "wall_s": updates * SECONDS[schedule], "copied_weight_bytes": 0},
        }
        for stage in range(N)
    ]
    return {"event": "drain", "schedule": schedule, "iteration": iteration, "stages": stages}


def _memory(iteration: int, schedule: str) -> dict[str, Any]:
    saved = [(N - stage) << 22 if schedule == "paci" else None for stage in range(N)]
    none = dict.fromkeys(("process_peak_bytes", "process_reserved_bytes", "process_device_bytes"), [None] * N)
    return {"event": "memory", "iteration": iteration, "saved_activation_bytes": saved, **none}


def write_events(path: Path, events: Iterable[dict[str, Any]]) -> Path:
    """A metrics file of these events."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def write_trace(folder: Path, schedule: str, updates: int = EVAL, num_stages: int = N, a: int = A) -> None:
    """A trace of the first plan: what the simulation gives for slower stages one after the other, with its waits."""
    costs = Costs(tuple(StageCosts(0.010 + stage / 1000, 0.020, update_s=0.002) for stage in range(num_stages)), jitter=0.1)
    plans = [
        paci(stage, num_stages, a, lambda update: update == updates)
        if schedule == "paci"
        else one_f_one_b_flush(stage, num_stages, a)
        for stage in range(num_stages)
    ]
    for stage, run in enumerate(simulate(plans, costs, last_update=updates, record=True).stages):
        size = {"num_stages": num_stages, "schedule": schedule, "emulated": False, "microbatches_per_update": a}
        events: list[dict[str, Any]] = [{"event": "plan", "stage": stage, **size, "after_iteration": 0, "time_s": 1000.0}]
        iteration, before_s = 1, 0.0
        for span in run.spans:
            # Of Megatron's own schedule waits are not traced.
            begin_s = before_s if schedule == "paci" else span.start_s
            times = {"start_s": begin_s, "waiting_s": span.start_s - begin_s, "compute_s": span.end_s - span.start_s}
            events.append({"event": "action", "iteration": iteration, "action": str(span.action), **times})
            iteration, before_s = iteration + (span.action.kind is Kind.UPDATE), span.end_s
        write_events(trace_path(folder, stage), [*events, {"event": "drain", "iteration": iteration - 1}])


def write_runs(folder: Path) -> list[Path]:
    """A run of each schedule with its trace, as the demo leaves them; their metrics files."""
    paths = []
    for schedule in ("1f1b", "paci"):
        paths.append(write_events(folder / f"{schedule}.jsonl", training(schedule)))
        write_trace(folder / f"{schedule}-trace", schedule)
    return paths
