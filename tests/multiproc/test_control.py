"""Clipping, gradients that are not finite, tied embeddings: the same on processes, emulated, and in the reference."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.helpers import (
    PACI,
    GetPool,
    OneProcess,
    arguments,
    assert_same_bits,
    assert_same_run,
    assert_same_weights,
    emulated,
    slow,
)
from tests.support.helpers import without as without_flags
from tests.support.interruptions import Injection
from tests.support.jobs import TrainingResult
from tests.support.pool import JobError

CLIPPED = ["--clip-grad", "0.5"]  # gradients of the small model have norms between 1 and 3
UNCHECKED = ["--no-check-for-nan-in-loss-and-grad"]


def argv_of(corpus: str, num_stages: int, a: int, *more: str, tied: bool = False, iters: int = 6) -> list[str]:
    """A small run; ``tied`` is Megatron's default model."""
    argv = arguments(corpus, num_stages, a, *more, iters=iters)
    if tied:
        argv.remove("--untie-embeddings-and-output-weights")
    return argv


CASES = {
    "clipped": (CLIPPED, False, None),
    "clipped-by-stage": ([*CLIPPED, "--paci-clip-mode", "stage"], False, None),
    "tied": ([], True, None),
    "tied-clipped": (CLIPPED, True, None),
    "spike": (CLIPPED, False, Injection(stage=1, microbatch=4, factor=1000.0, backward=True)),
    "nan-forward": ([*CLIPPED, *UNCHECKED], False, Injection(stage=1, microbatch=4, factor=math.nan)),
    "nan-backward": ([*CLIPPED, *UNCHECKED], False, Injection(stage=1, microbatch=4, factor=math.nan, backward=True)),
    "nan-backward-tied": ([*CLIPPED, *UNCHECKED], True, Injection(stage=1, microbatch=4, factor=math.nan, backward=True)),
    "nan-on-the-last-stage": (UNCHECKED, True, Injection(stage=-1, microbatch=4, factor=math.nan, backward=True)),
}

HARDEST = ("tied-clipped", "nan-backward-tied")


@pytest.mark.parametrize(
    ("num_stages", "a", "case"),
    [
        *((4, 3, case) for case in CASES),
        *((num_stages, a, case) for num_stages, a in ((2, 2), (4, 1)) for case in ("tied-clipped", "nan-backward-tied")),
        *slow(
            *(
                (n, a, case)
                for n, a in ((2, 2), (4, 1))
                for case in CASES
                if case not in ("tied-clipped", "nan-backward-tied")
            )
        ),
    ],
)
def test_processes_are_emulated_stages_and_the_reference(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int, case: str
) -> None:
    flags, tied, injection = CASES[case]
    if injection is not None and injection.stage < 0:
        injection = Injection(num_stages - 1, injection.microbatch, injection.factor, injection.backward)
    off = ["--attention-dropout", "0", "--hidden-dropout", "0", "--weight-decay", "0"]
    argv = argv_of(corpus, num_stages, a, *flags, *off, *PACI, tied=tied)
    one = one_process(emulated(argv), within=injection)
    processes = pool(num_stages).run("train", argv=argv, within=injection)
    assert_same_run(processes, one)
    if "stage" not in case or "nan" in case:  # the reference does not know --paci-clip-mode stage
        reference = one_process(emulated(argv), job="train_by_reference", within=injection)
        assert np.array_equal(one.losses, reference.losses, equal_nan=True)
        assert_same_weights(one.stage_weights, reference.stage_weights)
    assert all(np.isfinite(weight).all() for stage in one.stage_weights for weight in stage.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 3)])
def test_drained_clipping_is_megatrons(pool: GetPool, corpus: str, num_stages: int, a: int, tied: bool) -> None:
    argv = argv_of(corpus, num_stages, a, *CLIPPED, tied=tied)
    flush = pool(num_stages).run("train", argv=argv)
    drained = pool(num_stages).run("train", argv=[*argv, *PACI, "--paci-drain-interval", "1"])
    unclipped = pool(num_stages).run("train", argv=argv_of(corpus, num_stages, a, tied=tied))
    np.testing.assert_allclose(drained[-1].losses, flush[-1].losses, rtol=1e-6)
    np.testing.assert_allclose(drained[-1].evaluations, flush[-1].evaluations, rtol=1e-6)
    assert abs(unclipped[-1].losses[-1] / flush[-1].losses[-1] - 1) > 1e-4, "the clipping does nothing"


@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 3)])
@pytest.mark.parametrize(("tied", "per_token"), [(True, False), (False, True), (True, True)])
def test_drained_tied_or_per_token_training_is_megatrons_bit_for_bit(
    pool: GetPool, corpus: str, num_stages: int, a: int, tied: bool, per_token: bool
) -> None:
    argv = argv_of(corpus, num_stages, a, *(["--calculate-per-token-loss"] if per_token else []), tied=tied)
    flush = pool(num_stages).run("train", argv=argv)
    drained = pool(num_stages).run("train", argv=[*argv, *PACI, "--paci-drain-interval", "1"])
    assert_same_bits(flush, drained)


@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 1)])
def test_per_token_loss_without_drains(pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int) -> None:
    """With no token masked the loss per token and that per micro-batch are the same mean."""
    argv = argv_of(corpus, num_stages, a, *PACI)
    per_token = [*argv, "--calculate-per-token-loss"]
    processes = pool(num_stages).run("train", argv=per_token)
    assert_same_run(processes, one_process(emulated(per_token)))
    per_microbatch = pool(num_stages).run("train", argv=argv)
    np.testing.assert_allclose(processes[-1].losses, per_microbatch[-1].losses, rtol=1e-5)


@pytest.mark.parametrize(("num_stages", "dp"), [(2, 1), (4, 1), (2, 2)])
def test_no_collective_crosses_stages_with_all_of_it_on(pool: GetPool, corpus: str, num_stages: int, dp: int) -> None:
    argv = arguments(corpus, num_stages, 2, *CLIPPED, *PACI, "--exit-signal-handler", iters=12, dp=dp)
    argv.remove("--untie-embeddings-and-output-weights")
    argv += ["--exit-duration-in-mins", "100", "--paci-fallback", "3", "--calculate-per-token-loss"]
    results = pool(num_stages * dp).run("train", argv=argv, count_collectives=True)
    assert [result.collectives for result in results] == [{}] * len(results)


@pytest.mark.parametrize("num_stages", [2])
def test_clipping_bounds_a_spike(one_process: OneProcess, corpus: str, num_stages: int) -> None:
    spike = Injection(stage=1, microbatch=41, factor=1000.0, backward=True)

    def final_loss(*flags: str, within: Injection | None = None) -> float:
        argv = without_flags(argv_of(corpus, num_stages, 2, *flags, *PACI, *UNCHECKED, iters=60), "--lr")
        argv = emulated([*argv, "--optimizer", "sgd", "--lr", "0.3"])
        result: TrainingResult = one_process(argv, within=within)
        return float(np.mean(result.losses[-5:]))

    assert final_loss(*CLIPPED, within=spike) == pytest.approx(final_loss(*CLIPPED), rel=0.02)
    harmed = final_loss(within=spike)
    assert not harmed < 1.1 * final_loss(), "without clipping the spike does no harm"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_megatrons_check_ends_the_job_and_keeps_the_checkpoint(
    pool: GetPool, corpus: str, tmp_path: Path, backward: bool
) -> None:
    saving = ["--save", str(tmp_path), "--save-interval", "2", "--override-opt-param-scheduler"]
    argv = argv_of(corpus, 2, 2, *CLIPPED, *PACI, tied=True)
    whole = pool(2).run("train", argv=[*argv, *saving])
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # In window 4, between the checkpoints after iterations 2 and 4.
    with pytest.raises(JobError, match=r"(?i)found nan in"):
        pool(2).run("train", argv=[*argv, *saving], within=Injection(1, 2 * 3, math.nan, backward))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    resumed = pool(2).run("train", argv=[*argv, *saving, "--load", str(tmp_path)])
    assert resumed[-1].losses == whole[-1].losses[2:]
