"""fp16 and loss scales: Megatron's own when drained, and the same on all stages, emulated or not, when not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated, slow
from tests.support.interruptions import Injection

DYNAMIC = ["--fp16", "--loss-scale-window", "3", "--hysteresis", "2", "--initial-loss-scale", "4096"]
CASES = {
    "dynamic": DYNAMIC,
    "too-much-at-first": ["--fp16", "--loss-scale-window", "3", "--hysteresis", "1", "--initial-loss-scale", str(2.0**24)],
    "summed-in-fp32": [*DYNAMIC, "--accumulate-allreduce-grads-in-fp32"],
    "constant": ["--fp16", "--loss-scale", "1000"],
    "distributed-optimizer": [*DYNAMIC, "--use-distributed-optimizer"],
    "experts": [
        *DYNAMIC,
        *("--num-experts", "4", "--moe-router-topk", "2", "--moe-router-load-balancing-type", "aux_loss"),
        *("--moe-aux-loss-coeff", "1e-2", "--disable-bias-linear"),
    ],
    "constant-bf16": ["--bf16", "--loss-scale", "1000"],
}
OVERFLOW = Injection(stage=1, microbatch=4, factor=math.inf, backward=True)


def argv_of(corpus: str, num_stages: int, a: int, *flags: str, tied: bool, iters: int = 8) -> list[str]:
    """A small run in half precision."""
    argv = arguments(corpus, num_stages, a, *flags, "--no-check-for-nan-in-loss-and-grad", iters=iters)
    if tied:
        argv.remove("--untie-embeddings-and-output-weights")
    return argv


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("num_stages", "a", "case"), [(2, 3, case) for case in CASES] + [(4, 2, "dynamic"), *slow(*((4, 1, c) for c in CASES))]
)
def test_drained_it_is_megatrons_flush_bit_for_bit(
    pool: GetPool, corpus: str, num_stages: int, a: int, case: str, tied: bool
) -> None:
    argv = argv_of(corpus, num_stages, a, *CASES[case], tied=tied)
    flush = pool(num_stages).run("train", argv=argv, within=OVERFLOW)
    drained = pool(num_stages).run("train", argv=[*argv, *PACI, "--paci-drain-interval", "1"], within=OVERFLOW)
    assert sum(flush[-1].skipped) >= 1
    assert case.startswith("constant") or len(set(flush[-1].scales)) > 1, "the scale never changes"
    for left, right in zip(flush, drained, strict=True):
        assert left.scales == right.scales
        assert left.skipped == right.skipped
    assert_same_bits(flush, drained)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("num_stages", "a", "case"),
    [
        (2, 2, "dynamic"),
        (4, 1, "too-much-at-first"),
        (4, 3, "dynamic"),
        (4, 2, "summed-in-fp32"),
        (2, 1, "experts"),
        *slow((2, 1, "too-much-at-first")),
    ],
)
def test_processes_are_emulated_stages(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int, case: str, tied: bool
) -> None:
    argv = argv_of(corpus, num_stages, a, *CASES[case], "--clip-grad", "1.0", *PACI, tied=tied, iters=16)
    processes = pool(num_stages).run("train", argv=argv, within=OVERFLOW)
    one = one_process(emulated(argv), within=OVERFLOW)
    assert_same_run(processes, one)
    assert len(set(one.scales)) > 1, "the scale never changes"
    assert all(process.scales == one.scales for process in processes), "the stages disagree on the scale"


def test_a_scale_is_used_as_soon_as_all_stages_can_know_it(pool: GetPool, corpus: str) -> None:
    """The scale after update k is that of window k + lag + 1: here 4096 grows after the third, 2 + 1 windows later."""
    argv = argv_of(corpus, 2, 1, *DYNAMIC, *PACI, tied=False, iters=9)
    scales = pool(2).run("train", argv=argv)[-1].scales  # after iteration k: that of window k + 1
    assert scales[:8] == [4096.0] * 4 + [8192.0] * 3 + [16384.0]
    assert scales[8] == 4096.0 * 2**3, "at the drain that of the last update"


def test_nothing_crosses_stages_between_drains(pool: GetPool, corpus: str) -> None:
    argv = argv_of(corpus, 2, 2, *DYNAMIC, *PACI, tied=True, iters=12)
    results = pool(2).run("train", argv=argv, count_collectives=True)
    assert [result.collectives for result in results] == [{}] * 2


@pytest.mark.parametrize("more", [[], ["--use-distributed-optimizer"]], ids=["plain", "distributed-optimizer"])
def test_a_resumed_run_goes_on_with_the_scale(pool: GetPool, corpus: str, tmp_path: Path, more: list[str]) -> None:
    saving = ["--save", str(tmp_path), "--save-interval", "5", *more]
    argv = argv_of(corpus, 2, 2, *DYNAMIC, *PACI, *saving, tied=True, iters=10)
    whole = pool(2).run("train", argv=argv, within=OVERFLOW)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    resumed = pool(2).run("train", argv=[*argv, "--load", str(tmp_path)])
    assert resumed[-1].scales == whole[-1].scales[5:]
    assert resumed[-1].losses == whole[-1].losses[5:]
