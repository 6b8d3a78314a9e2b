"""What the tests on processes share: a small training's command line, and equality of two trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from .jobs import TrainingResult
from .pool import Pool

GetPool = Callable[[int], Pool]
OneProcess = Callable[..., TrainingResult]
PACI = ["--pipeline-schedule", "paci"]


def arguments(
    corpus: str, num_stages: int, microbatches_per_update: int, *more: str, iters: int = 6, dp: int = 1
) -> list[str]:
    """A small GPT with dropout, on random tokens, in fp32 without clipping."""
    return [
        *(
            "--num-layers",
            "4",
            "--hidden-size",
            "32",
            "--num-attention-heads",
            "2",
            "--untie-embeddings-and-output-weights",
        ),
        *(
            "--seq-length",
            "16",
            "--max-position-embeddings",
            "16",
            "--attention-dropout",
            "0.1",
            "--hidden-dropout",
            "0.1",
        ),
        *("--data-path", corpus, "--split", "90,5,5", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64"),
        *("--micro-batch-size", "2", "--global-batch-size", str(2 * microbatches_per_update * dp)),
        *("--train-iters", str(iters), "--lr", "1e-2", "--lr-decay-style", "constant", "--clip-grad", "0"),
        *("--eval-interval", "1000", "--eval-iters", "1", "--log-interval", "1", "--seed", "7", "--num-workers", "0"),
        *("--pipeline-model-parallel-size", str(num_stages)),
        *more,
    ]


def slow(*cases: tuple[Any, ...], ids: tuple[str, ...] = ()) -> list[Any]:
    """Test parameters for ``-m slow``: more of the same, which would take a commit's tests too long."""
    return [pytest.param(*case, marks=pytest.mark.slow, id=ids[index] if ids else None) for index, case in enumerate(cases)]


def emulated(argv: list[str]) -> list[str]:
    """The same run with its stages in one process."""
    at = argv.index("--pipeline-model-parallel-size")
    return [*argv[:at], *argv[at + 2 :], "--paci-emulate-stages", argv[at + 1]]


def without(argv: list[str], *flags: str) -> list[str]:
    """``argv`` without these flags and their values."""
    for flag in flags:
        at = argv.index(flag)
        argv = [*argv[:at], *argv[at + 2 :]]
    return argv


def assert_same_weights(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    """The weights of all stages agree in every bit."""
    for stage, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.keys() == b.keys() and a
        for name in a:
            assert np.array_equal(a[name], b[name]), f"stage {stage}, {name}"


def assert_same_run(processes: list[TrainingResult], one: TrainingResult) -> None:
    """Every loss, evaluation and final weight of the processes is the emulation's, in every bit."""
    assert one.losses and len(one.evaluations) >= 2
    assert np.array_equal(processes[-1].losses, one.losses, equal_nan=True)
    assert processes[-1].evaluations == one.evaluations
    assert_same_weights([process.weights for process in processes], one.stage_weights)


def assert_same_bits(left: list[TrainingResult], right: list[TrainingResult]) -> None:
    """Losses, evaluations and final weights agree in every bit on every rank."""
    for rank, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.losses == b.losses, f"rank {rank}"
        assert a.evaluations == b.evaluations, f"rank {rank}"
        assert a.weights.keys() == b.weights.keys()
        for name in a.weights:
            assert np.array_equal(a.weights[name], b.weights[name]), f"rank {rank}, {name}"
