"""What the tests on processes share: a small training's command line, and equality of two trainings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .jobs import TrainingResult
from .pool import Pool

GetPool = Callable[[int], Pool]
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


def assert_same_bits(left: list[TrainingResult], right: list[TrainingResult]) -> None:
    """Losses, evaluations and final weights agree in every bit on every rank."""
    for rank, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.losses == b.losses, f"rank {rank}"
        assert a.evaluations == b.evaluations, f"rank {rank}"
        assert a.weights.keys() == b.weights.keys()
        for name in a.weights:
            assert np.array_equal(a.weights[name], b.weights[name]), f"rank {rank}, {name}"
