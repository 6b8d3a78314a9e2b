"""``paci-megatron doctor``: whether this machine can train under PACI. See --help."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from paci_megatron import install
from paci_megatron.telemetry.metrics_file import read_metrics

from .parser import CommandParser

DESCRIPTION = (
    "Checks this machine, a line each, PASS, FAIL or SKIP: what is installed, which kernels will be used, and one short "
    "training by two processes on the CPU, which with a drain at every update must be Megatron's 1F1B-flush bit for bit "
    "(under a minute). Exit status 1 if a check failed."
)
_TRAINING = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "16"),
    *("--max-position-embeddings", "16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64", "--mock-data"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "5e-3", "--lr-decay-style", "constant"),
    *("--eval-interval", "100", "--eval-iters", "1", "--log-interval", "1", "--num-workers", "0"),
    *("--train-iters", "8", "--pipeline-model-parallel-size", "2"),
]
_ON_CPU = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


class _Skip(Exception):
    """A check that says nothing here; the message is the reason."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print a line for each check; 1 if one failed, else 0."""
    parser = CommandParser(prog or "doctor", DESCRIPTION)
    parser.add_argument("--without-training", action="store_true", help="leave out the short training")
    arguments = parser.parse_args(argv)
    failed = False
    for name, check in _checks(not arguments.without_training):
        try:
            status, said = "PASS", check()
        except _Skip as reason:
            status, said = "SKIP", str(reason)
        except Exception as error:
            status, said, failed = "FAIL", str(error) or type(error).__name__, True
        print(f"{status}  {name:<18} {said}", flush=True)
    return int(failed)


def _checks(trains: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Python", platform.python_version
    yield "PyTorch", lambda: version("torch")
    yield "Megatron", _megatron
    yield "Transformer Engine", _transformer_engine
    yield "Apex", _apex
    yield "GPUs", _gpus
    if trains:
        yield "training", _training


def _megatron() -> str:
    from paci_megatron.plugin.install import TESTED_VERSIONS

    install()
    return (
        f"{version('megatron-core')}, all functions that are replaced are as expected (tested: {', '.join(TESTED_VERSIONS)})"
    )


def _transformer_engine() -> str:
    from paci_megatron.platform.without_te import has_transformer_engine

    if not has_transformer_engine():
        raise _Skip("not installed: Megatron's own layers are used (pip install 'paci-megatron[gpu]')")
    return "installed: its layers, attention and optimizer are used"


def _apex() -> str:
    from paci_megatron.platform.without_te import has_apex, has_fused_weight_gradient

    if not has_apex():
        raise _Skip("not installed: nothing needs it (it is built from NVIDIA's sources)")
    return f"installed, {'with' if has_fused_weight_gradient() else 'without'} its fused weight gradients"


def _gpus() -> str:
    from paci_megatron.platform import cpu

    if cpu.is_active():
        raise _Skip("no CUDA device: everything runs on the CPU over gloo")
    raise _Skip("not checked here: in a checkout, python tools/gpu_check.py")


def _training() -> str:
    with tempfile.TemporaryDirectory() as folder:
        flush = _losses(Path(folder) / "flush.jsonl")
        drained = _losses(Path(folder) / "paci.jsonl", "--pipeline-schedule", "paci", "--paci-drain-interval", "1")
    if not flush or flush != drained:
        raise RuntimeError(
            f"losses with a drain at every update, {drained}, are not 1F1B-flush's, {flush}; please report it"
        )
    return f"{len(flush)} iterations by two processes with a drain at every update are 1F1B-flush's, bit for bit"


def _losses(metrics: Path, *options: str) -> list[float]:
    """The losses of a training with ``options``, by iteration."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "pretrain_gpt_paci",
    ]
    command = [*launcher, *_TRAINING, *options, "--paci-metrics-file", str(metrics)]
    done = subprocess.run(
        command, cwd=metrics.parent, env={**os.environ, **_ON_CPU}, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"the training ended with status {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return [event["loss"] for event in read_metrics(metrics) if event["event"] == "train"]
