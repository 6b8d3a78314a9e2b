"""Trains the same small GPT with Megatron's 1F1B-flush and with PACI, on this machine, and compares them.

`make demo` runs it. See README.md beside this file for what it writes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout that is not installed works too

from examples.gpt.demo_corpus import standard_library, write_corpus
from examples.gpt.demo_report import NAMES, SCHEDULES, plot_curves, summarize, table
from lab import processes
from lab.processes import ROOT
from paci_megatron.telemetry.metrics_file import read_metrics
from paci_megatron.telemetry.run_report.page import write_report

TRAIN_ITERS = 840
# Evaluations divide training into this many periods of so many log intervals. The first and the last log interval of a
# period hold the pipeline's fill and drain; those between are steady state.
PERIODS = 6
LOG_INTERVALS_PER_PERIOD = 7
MIN_TRAIN_ITERS = 4 * PERIODS
# With this vocabulary the output layer and the loss take as long as one transformer layer of the CPU's model, so that
# the stages are balanced with one layer less on the last.
VOCAB_SIZE = 3072
HELD_OUT_FRACTION = 0.05
LAYERS_PER_STAGE = 2
MAX_STAGES = 8


class StepFailedError(Exception):
    """A step of the demo ended with an error; the message says which and shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is trained. Sizes in tokens and in sequences, as Megatron's flags."""

    num_stages: int
    on_gpu: bool
    train_iters: int

    @property
    def microbatches_per_update(self) -> int:
        """As many as stages, which bounds the drift at one update; the speed-up's limit is then (2N-1)/N."""
        return self.num_stages

    @property
    def eval_interval(self) -> int:
        """Iterations from one evaluation, and so drain, to the next."""
        return self.train_iters // PERIODS

    @property
    def log_interval(self) -> int:
        """Iterations from one log line to the next."""
        return max(1, self.eval_interval // LOG_INTERVALS_PER_PERIOD)

    def flags(self) -> dict[str, Any]:
        """Megatron's flags for model, batch and optimizer; None for those without a value."""
        # On a CPU a micro-batch should take tens of milliseconds on a stage, so that all else is small beside it. Small
        # batches and learning rates: many small updates make a drift of one update matter little.
        # Narrow models learn badly from Megatron's default initialisation of 0.02.
        if self.on_gpu:
            hidden_size, heads, seq_length, micro_batch_size, lr, init_std = 512, 8, 256, 8, 3e-4, 0.02
        else:
            hidden_size, heads, seq_length, micro_batch_size, lr, init_std = 160, 2, 128, 2, 5e-4, 0.05
        batch_size = micro_batch_size * self.microbatches_per_update
        return {
            "pipeline-model-parallel-size": self.num_stages,
            "num-layers": LAYERS_PER_STAGE * self.num_stages - 1,
            "account-for-loss-in-pipeline-split": None,
            "hidden-size": hidden_size,
            "num-attention-heads": heads,
            "seq-length": seq_length,
            "max-position-embeddings": seq_length,
            "untie-embeddings-and-output-weights": None,
            "hidden-dropout": 0.0,  # less than one pass over the corpus: there is nothing to overfit
            "attention-dropout": 0.0,
            "micro-batch-size": micro_batch_size,
            "global-batch-size": batch_size,
            "train-iters": self.train_iters,
            "init-method-std": init_std,
            "lr": lr,
            "min-lr": lr / 10,
            "lr-decay-style": "cosine",
            "lr-warmup-fraction": 0.1,
            "adam-beta1": 0.9,
            "adam-beta2": 0.95,
            "weight-decay": 0.1,
            "clip-grad": 0.0,
            "seed": 1234,
            "log-interval": self.log_interval,
            "eval-interval": self.eval_interval,
            # Many micro-batches a pass, so that evaluating is little bubble.
            "eval-global-batch-size": 16 * batch_size,
            "eval-iters": 6,
            # Processes that load data would compete with the stages for the cores.
            **({"bf16": None} if self.on_gpu else {"num-workers": 0}),
        }


def pipeline_stages(num_gpus: int) -> int:
    """Stages to train with: the largest power of two that there are GPUs for, two on a CPU."""
    return max(2, min(MAX_STAGES, 1 << num_gpus.bit_length() - 1)) if num_gpus else 2


def preprocess_command(corpus: Path, prefix: Path) -> list[str]:
    """The command that trains the vocabulary and writes training and held-out documents."""
    return [
        *("tools/preprocess_data.py", "--input", _shown(corpus), "--output-prefix", _shown(prefix)),
        *("--train-tokenizer", "--vocab-size", str(VOCAB_SIZE)),
        *("--held-out-fraction", str(HELD_OUT_FRACTION), "--workers", "2"),
    ]


def training_command(settings: Settings, schedule: str, prefix: Path, metrics: Path) -> list[str]:
    """A schedule's training. The two differ by ``--pipeline-schedule paci`` and by the metrics file."""
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.num_stages)),
        "pretrain_gpt_paci.py",
    ]
    for flag, value in settings.flags().items():
        command += [f"--{flag}"] if value is None else [f"--{flag}", str(value)]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{_shown(prefix)}_tokenizer.model"]
    for split in ("train", "valid"):
        command += [f"--{split}-data-path", f"{_shown(prefix)}_{split}_document"]
    command += ["--data-cache-path", _shown(_index_cache(prefix)), "--paci-metrics-file", _shown(metrics)]
    command += ["--paci-trace-dir", _shown(trace_folder(metrics))]
    return [*command, "--pipeline-schedule", "paci"] if schedule == "paci" else command


def trace_folder(metrics: Path) -> Path:
    """Where the run of this metrics file writes when each stage did each action."""
    return metrics.with_name(f"{metrics.stem}-trace")


def _index_cache(prefix: Path) -> Path:
    return prefix.parent / "index-cache"


def _shown(path: Path) -> str:
    """``path`` as a command run from the project's root needs it, short where that is possible."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


_ITERATION = re.compile(r"iteration +\d+/ *\d+")
_KEPT_FIELDS = ("elapsed time per iteration", "learning rate", "lm loss")


def progress_line(line: str) -> str | None:
    """What of a training's log line is shown: Megatron's iterations and evaluations, PACI's own lines, else None."""
    line = line.strip()
    if iteration := _ITERATION.search(line):
        fields = [field.strip() for field in line.split("|")]
        return " | ".join([iteration[0], *(field for field in fields if field.startswith(_KEPT_FIELDS))])
    return line if line.startswith(("paci-megatron: ", "validation loss at ")) else None


def run_step(
    name: str, command: list[str], log: Path, environment: dict[str, str], shown: Callable[[str], str | None]
) -> None:
    """Run a Python command from the project's root: all output to ``log``, and what ``shown`` makes of it to the screen.

    ``StepFailedError`` if it fails. An interrupt ends it first.
    """
    print(f"$ python {shlex.join(command)}", flush=True)
    with open(log, "wb") as file:
        process = processes.start(command, file, environment, pipe=True)
        try:
            for line in process.stdout or ():
                file.write(line)
                if (text := shown(line.decode(errors="replace"))) is not None:
                    print(f"  {text}", flush=True)
            status = process.wait()
        except BaseException:
            processes.end(process)
            raise
    if status:
        raise StepFailedError(processes.failure(name, status, log))


def choose_settings(train_iters: int) -> Settings:
    """Settings for this machine, with a line that says what was found."""
    import torch

    num_gpus = torch.cuda.device_count()
    settings = Settings(pipeline_stages(num_gpus), on_gpu=num_gpus >= 2, train_iters=train_iters)
    if settings.on_gpu:
        found = f"{num_gpus} GPUs"
    elif num_gpus:
        found = "1 GPU, and a pipeline needs two: on the CPU"
    else:
        found = "no GPU: on the CPU"
    print(f"{found}; {settings.num_stages} stages, {settings.microbatches_per_update} micro-batches per update")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < settings.num_stages:
        print(f"warning: {settings.num_stages} stages share {cores} cores, so no schedule can be faster than another")
    return settings


def run_demo(output: Path, settings: Settings) -> dict[str, Any]:
    """Build the data, train with each schedule, compare; returns the content of ``summary.json``."""
    prefix = output / "data" / "stdlib"
    corpus = prefix.with_suffix(".jsonl")
    environment = processes.environment(settings.on_gpu)
    with _timed("corpus: the standard library's source files"):
        num_documents, num_bytes = write_corpus(standard_library(), corpus)
        print(f"  {corpus}: {num_documents} documents, {num_bytes / 1e6:.1f} MB")
    with _timed("vocabulary and preprocessing"):
        command = preprocess_command(corpus, prefix)
        run_step("preprocessing", command, output / "preprocess.log", environment, shown=str.rstrip)
        # Megatron finds an index by the data's path and the settings, and would reuse that of an earlier corpus.
        shutil.rmtree(_index_cache(prefix), ignore_errors=True)
    metrics = {schedule: output / f"{schedule}.jsonl" for schedule in SCHEDULES}
    for schedule in SCHEDULES:
        with _timed(f"training with {NAMES[schedule]}"):
            metrics[schedule].unlink(missing_ok=True)  # a training appends to it, and to its trace
            shutil.rmtree(trace_folder(metrics[schedule]), ignore_errors=True)
            command = training_command(settings, schedule, prefix, metrics[schedule])
            log = output / f"{schedule}.log"
            run_step(f"training with {NAMES[schedule]}", command, log, environment, progress_line)
    runs = {schedule: read_metrics(path) for schedule, path in metrics.items()}
    summary = summarize(runs, settings.num_stages, settings.microbatches_per_update)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot_curves(runs, summary, output / "curves.png")
    write_report([(NAMES[schedule], path) for schedule, path in metrics.items()], output / "report.html")
    return summary


@contextlib.contextmanager
def _timed(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    begin_s = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - begin_s:.1f} s", flush=True)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "runs" / "demo",
        metavar="DIR",
        help="folder for everything that is written (default: runs/demo in the project)",
    )
    parser.add_argument(
        "--train-iters",
        type=int,
        default=TRAIN_ITERS,
        metavar="N",
        help=f"iterations of each training (default: {TRAIN_ITERS}); fewer for a quick look, at least {MIN_TRAIN_ITERS}",
    )
    arguments = parser.parse_args(argv)
    if arguments.train_iters < MIN_TRAIN_ITERS:
        # Else no log interval would lie strictly between two drains.
        parser.error(f"--train-iters {arguments.train_iters}: must be at least {MIN_TRAIN_ITERS} to measure a speed")
    return arguments


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, 1 if a step failed, or 130 if interrupted."""
    arguments = _parse_arguments(argv)
    output = arguments.output.resolve()
    begin_s = time.perf_counter()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        output.mkdir(parents=True, exist_ok=True)
        summary = run_demo(output, choose_settings(arguments.train_iters))
    except (StepFailedError, OSError, ValueError) as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo.py: interrupted", file=sys.stderr)
        return 130
    print(f"\n{table(summary)}\n")
    for name in ("report.html", "summary.json", "curves.png", "1f1b.jsonl", "paci.jsonl"):
        print(f"{output / name}")
    print(f"done in {time.perf_counter() - begin_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
