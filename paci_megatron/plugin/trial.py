"""A short training of a tiny model by two processes, whose result is known: what ``paci-megatron doctor`` trains."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paci_megatron.schedule.plan import Plan
from paci_megatron.telemetry.metrics_file import read_metrics

NUM_STAGES, MICROBATCHES, ITERATIONS = 2, 2, 8
MODEL = (
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--max-position-embeddings", "16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--mock-data"),
    *("--micro-batch-size", "2", "--global-batch-size", str(2 * MICROBATCHES), "--lr", "5e-3"),
    *("--lr-decay-style", "constant", "--eval-interval", "100", "--eval-iters", "1", "--log-interval", "1"),
    *("--num-workers", "0", "--train-iters", str(ITERATIONS), "--pipeline-model-parallel-size", str(NUM_STAGES)),
)
_ON_CPU = {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
_TIMEOUT_S = 300.0  # of one training; seconds where all is well
_END_TIMEOUT_S = 40.0  # torchrun gives its workers 30 s
_TAIL_LINES = 30


class TrialError(RuntimeError):
    """A training that did not end, or whose result is not what it must be."""


def verified_training(on_gpus: bool) -> str:
    """Train with 1F1B-flush, with PACI and a drain at every update, and with PACI: what was found, in one line.

    The first two must have the same losses bit for bit, and the third the drift that its plan has at every stage.
    Over NCCL on two GPUs, or over gloo on the CPU. ``TrialError`` says what is wrong.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        flush = losses(train(Path(folder), on_gpus, "1f1b"))
        drained = losses(train(Path(folder), on_gpus, "paci", "--paci-drain-interval", "1"))
        free = train(Path(folder), on_gpus, "paci")
    if len(flush) != ITERATIONS or not all(map(math.isfinite, flush)):
        raise TrialError(f"1F1B-flush logged the losses {flush}, which must be {ITERATIONS} numbers; please report it")
    if drained != flush:
        raise TrialError(f"losses with a drain at every update, {drained}, are not 1F1B-flush's, {flush}; please report it")
    if len(losses(free)) != ITERATIONS or not all(map(math.isfinite, losses(free))):
        raise TrialError(f"PACI logged the losses {losses(free)}, which must be {ITERATIONS} numbers; please report it")
    plan = Plan("paci", NUM_STAGES, MICROBATCHES, (0,) * (NUM_STAGES - 1))
    bound, measured = [plan.max_drift(stage) for stage in range(NUM_STAGES)], drift(free)
    # As large, not only as small: without any drift it would have been a flush.
    if measured != bound:
        raise TrialError(f"drift by stage of {measured} updates, where the plan has {bound}; please report it")
    return (
        f"two processes over {'NCCL' if on_gpus else 'gloo on the CPU'}: PACI with a drain at every update has 1F1B-flush's "
        f"{ITERATIONS} losses bit for bit, and without drains the drift that it may have (by stage: "
        f"{' '.join(map(str, measured))} updates)"
    )


def train(folder: Path, on_gpus: bool, schedule: str, *options: str) -> list[dict[str, Any]]:
    """The events of a training, all of whose files are in ``folder``; ``TrialError`` unless it ends well."""
    metrics = folder / f"{'-'.join([schedule, *options])}.jsonl"
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_STAGES}", "-m", "pretrain_gpt_paci")
    schedule_options = ("--pipeline-schedule", schedule, *options, "--paci-metrics-file", str(metrics))
    log = metrics.with_suffix(".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, *MODEL, *schedule_options],
            cwd=folder,
            env=_environment(folder, on_gpus),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the training in order
        )
        try:
            status: int | None = process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    if status != 0:
        ended = f"did not end in {_TIMEOUT_S:.0f} s" if status is None else f"ended with status {status}"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        raise TrialError(f"the training with {' '.join(['--pipeline-schedule', schedule, *options])} {ended}:\n{tail}")
    return read_metrics(metrics)


def losses(events: list[dict[str, Any]]) -> list[float]:
    """By iteration."""
    return [event["loss"] for event in events if event["event"] == "train"]


def drift(events: list[dict[str, Any]]) -> list[int]:
    """The largest of each stage, in updates."""
    drains = [event["stages"] for event in events if event["event"] == "drain"]
    return [max(stage["max_drift"] for stage in stages) for stages in zip(*drains, strict=True)]


def _environment(folder: Path, on_gpus: bool) -> dict[str, str]:
    # A checkout need not be installed. Last on the path: what is found without it stays as it is.
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package]))
    caches = {name: str(folder) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    return {**os.environ, "OMP_NUM_THREADS": "1", **({} if on_gpus else _ON_CPU), **caches, "PYTHONPATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask torchrun to end its workers, and kill what is left of them all after a while."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the session's group, which is its own
    process.wait()
