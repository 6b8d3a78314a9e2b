"""The paper's figures (arXiv 2606.07881): GPT-2 Medium, 8 stages, 49.8B tokens of OpenWebText."""

from __future__ import annotations

# By batch size and micro-batches per update. The paper names two batches, each with flush at one number.
PERPLEXITY: dict[tuple[str, int, int], tuple[float, float]] = {
    ("paci", 128, 8): (15.483, 0.028),
    ("1f1b", 128, 8): (15.480, 0.265),
    ("paci", 256, 16): (15.291, 0.008),
    ("1f1b", 256, 16): (15.350, 0.089),
}
TRAINING_LOSS: dict[tuple[str, int, int], float] = {
    ("paci", 128, 4): 2.799,
    ("paci", 128, 8): 2.790,
    ("1f1b", 128, 8): 2.791,
    ("paci", 256, 8): 2.780,
    ("paci", 256, 16): 2.774,
    ("1f1b", 256, 16): 2.780,
}
TRAINING_LOSS_SPREAD: dict[tuple[str, int, int], float] = {("1f1b", 128, 8): 1.10e-2, ("paci", 128, 8): 1.81e-3}
SAME_COUNT_SPEEDUP: dict[tuple[int, int], float] = {(128, 8): 1.83, (256, 16): 1.48}
BEST_FLUSH_SPEEDUP: dict[int, float] = {128: 1.69, 256: 1.41}
THRESHOLD_SPEEDUP: dict[tuple[int, float], float] = {(128, 18): 1.14, (128, 17): 1.59, (128, 16): 1.64, (256, 16): 1.36}


def counterpart(batch_sizes: list[int], batch_size: int) -> int:
    """The paper's batch that stands beside ours: the smaller beside our smaller, the larger beside our larger."""
    return 128 if batch_size == min(batch_sizes) else 256
