"""Where checks run their trainings: each a process of its own, made once, whichever checks look at it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paci_megatron.telemetry.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 25
_END_TIMEOUT_S = 40.0  # torchrun gives its workers 30 s


class StepError(RuntimeError):
    """A command of a check failed; the message has the end of its log."""


@dataclass(frozen=True)
class Sizes:
    """What is trained, small or large. Batches in sequences; ``compared`` is the updates of runs compared in full."""

    num_layers: int
    hidden_size: int
    num_heads: int
    seq_length: int
    micro_batch_size: int
    microbatches_per_update: int
    vocab_size: int
    emulated_stages: int
    linked_stages: int
    updates: int
    compared: int
    bf16: bool
    train_timeout_s: float


GPU_SIZES = Sizes(
    num_layers=16,
    hidden_size=768,
    num_heads=12,
    seq_length=512,
    micro_batch_size=4,
    microbatches_per_update=8,
    vocab_size=8192,
    emulated_stages=8,
    linked_stages=4,
    updates=200,
    compared=30,
    bf16=True,
    train_timeout_s=240,
)
CPU_SIZES = Sizes(
    num_layers=4,
    hidden_size=64,
    num_heads=2,
    seq_length=64,
    micro_batch_size=2,
    microbatches_per_update=4,
    vocab_size=1024,
    emulated_stages=4,
    linked_stages=2,
    updates=60,
    compared=12,
    bf16=False,
    train_timeout_s=240,
)


@dataclass(frozen=True)
class TrainingRun:
    """What a training left in its metrics file."""

    events: list[dict[str, Any]]

    def losses(self) -> list[float]:
        """The loss of each update, in order."""
        return [event["loss"] for event in self.events if event["event"] == "train"]

    def last(self, kind: str) -> dict[str, Any]:
        """The last event of this kind; ``StepError`` if there is none."""
        found = [event for event in self.events if event["event"] == kind]
        if not found:
            raise StepError(f"a training wrote no {kind} event into its metrics file")
        return found[-1]


class Bench:
    """Runs commands from the project's root, each with a log in ``folder``. Training is on the GPU or on the CPU."""

    def __init__(self, folder: Path, sizes: Sizes, on_gpu: bool) -> None:
        self.folder, self.sizes, self.on_gpu = folder, sizes, on_gpu
        self._runs: dict[str, TrainingRun | StepError] = {}
        self._data_flags: list[str] | StepError | None = None

    def training(self, name: str, *flags: str, processes: int = 1) -> TrainingRun:
        """The training ``name``; made at the first call, with ``flags`` besides those of all. ``StepError`` if it failed."""
        if name not in self._runs:
            try:
                self._runs[name] = self._train(name, flags, processes)
            except StepError as error:
                self._runs[name] = error
        run = self._runs[name]
        if isinstance(run, StepError):
            raise run
        return run

    def emulated(self, name: str, schedule: str, num_stages: int, updates: int, *more: str) -> TrainingRun:
        """A training with its stages in one process, that ends after ``updates``."""
        stages = ("--paci-emulate-stages", str(num_stages))
        return self.training(name, *stages, "--pipeline-schedule", schedule, "--exit-interval", str(updates), *more)

    def processes(self, name: str, schedule: str, num_stages: int, updates: int, *more: str) -> TrainingRun:
        """A training with a process for each stage, that ends after ``updates``."""
        stages = ("--pipeline-model-parallel-size", str(num_stages))
        flags = (*stages, "--pipeline-schedule", schedule, "--exit-interval", str(updates), *more)
        return self.training(name, *flags, processes=num_stages)

    def command(self, name: str, command: Sequence[str], timeout_s: float = 300) -> Path:
        """Run Python with ``command``; the path of its log. ``StepError`` if it fails or takes longer."""
        log = self.folder / f"{name}.log"
        with open(log, "w", encoding="utf-8") as file:
            file.write(f"$ python {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that an interrupt reaches this process alone, which ends the others in order
            )
            try:
                status: int | None = process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _end(process)
        if status != 0:
            how = f"took longer than {timeout_s:g} s" if status is None else f"failed with status {status}"
            raise StepError("\n".join([f"{name} {how}; see {log}", *tail(log)]))
        return log

    def environment(self) -> dict[str, str]:
        """Of all commands: one thread, no compilation at start, kernels that give the same bits each time."""
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        }
        return variables if self.on_gpu else {**variables, "CUDA_VISIBLE_DEVICES": ""}

    def data_flags(self) -> list[str]:
        """Of a corpus made on the spot: the source files of Python's library. ``StepError`` if that fails."""
        if self._data_flags is None:
            try:
                self._data_flags = self._make_data()
            except StepError as error:
                self._data_flags = error
        if isinstance(self._data_flags, StepError):
            raise self._data_flags
        return self._data_flags

    def model_flags(self) -> list[str]:
        """Megatron's flags for the model, the batch and the optimizer."""
        sizes = self.sizes
        values = {
            "num-layers": sizes.num_layers,
            "hidden-size": sizes.hidden_size,
            "num-attention-heads": sizes.num_heads,
            "seq-length": sizes.seq_length,
            "max-position-embeddings": sizes.seq_length,
            "micro-batch-size": sizes.micro_batch_size,
            "global-batch-size": sizes.micro_batch_size * sizes.microbatches_per_update,
            "train-iters": sizes.updates,
            "lr": 3e-4 if self.on_gpu else 1e-3,
            "lr-decay-style": "constant",
            "lr-warmup-iters": sizes.updates // 10,
            "adam-beta2": 0.95,
            "weight-decay": 0.1,
            "clip-grad": 1.0,
            "hidden-dropout": 0.1,
            "attention-dropout": 0.0,
            "seed": 1234,
            "log-interval": 1,
            "eval-interval": 100_000,
            "eval-iters": 0,
            "num-workers": 0,
        }
        flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        return [*flags, "--untie-embeddings-and-output-weights", *(["--bf16"] if sizes.bf16 else [])]

    def _train(self, name: str, flags: Sequence[str], processes: int) -> TrainingRun:
        metrics = self.folder / f"{name}.jsonl"
        metrics.unlink(missing_ok=True)  # a training appends to it
        command = [*launcher(processes), "pretrain_gpt_paci.py", *self.model_flags(), *self.data_flags(), *flags]
        self.command(name, [*command, "--paci-metrics-file", str(metrics)], self.sizes.train_timeout_s)
        return TrainingRun(read_metrics(metrics))

    def _make_data(self) -> list[str]:
        from examples.gpt.demo_corpus import standard_library, write_corpus

        prefix = self.folder / "data" / "stdlib"
        write_corpus(standard_library(), prefix.with_suffix(".jsonl"))
        command = [
            "tools/preprocess_data.py",
            "--input",
            f"{prefix}.jsonl",
            "--output-prefix",
            str(prefix),
            "--workers",
            "2",
        ]
        self.command("preprocess", [*command, "--train-tokenizer", "--vocab-size", str(self.sizes.vocab_size)])
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}_tokenizer.model"]
        cache = ["--data-cache-path", str(prefix.parent / "index-cache")]
        return [*tokenizer, "--data-path", f"{prefix}_text_document", "--split", "100,0,0", *cache]


def launcher(processes: int) -> list[str]:
    """What starts a script in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def tail(log: Path) -> list[str]:
    """The last lines of ``log``, without torchrun's own, which say only that a process failed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    end = next((index for index, line in enumerate(lines) if "failed (exitcode:" in line), len(lines))
    return lines[:end][-_TAIL_LINES:]


def _end(process: subprocess.Popen[Any]) -> None:
    """Whatever happened, the process is gone afterwards, and with it the workers that torchrun ends."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
