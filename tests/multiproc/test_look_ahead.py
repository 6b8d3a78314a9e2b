"""A look-ahead without a copy of the weights: what the model holds, on processes, emulated, and over shared stages."""

from __future__ import annotations

import pytest

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated
from tests.support.look_ahead import OVERFLOW, weights_compared, weights_compared_and_one_skipped

AHEAD = [*PACI, "--paci-look-ahead"]
SKIPPING = ["--fp16", "--no-check-for-nan-in-loss-and-grad", "--loss-scale", "1000", *AHEAD, "--paci-drain-interval", "4"]


@pytest.mark.parametrize(("tied", "optimizer"), [(False, "adam"), (True, "adam"), (False, "muon")])
def test_drained_it_is_megatrons_flush_and_processes_are_the_emulation(
    pool: GetPool, corpus: str, one_process: OneProcess, tied: bool, optimizer: str
) -> None:
    argv = arguments(corpus, 2, 2, "--bf16", "--optimizer", optimizer)
    if tied:
        argv.remove("--untie-embeddings-and-output-weights")
    workers = pool(2)
    flush = workers.run("train", argv=argv)
    drained = workers.run("train", argv=[*argv, *AHEAD, "--paci-drain-interval", "1"], within=weights_compared)
    assert_same_bits(flush, drained)
    processes = workers.run("train", argv=[*argv, *AHEAD], within=weights_compared)
    assert_same_run(processes, one_process(emulated([*argv, *AHEAD]), within=weights_compared))
    without = workers.run("train", argv=[*argv, *PACI])
    assert processes[-1].losses[:1] == without[-1].losses[:1], "nothing is looked ahead to before the first update"
    assert processes[-1].losses[1:] != without[-1].losses[1:]


def test_an_update_skipped_at_a_drain_leaves_the_main_parameters_in_the_model(corpus: str, one_process: OneProcess) -> None:
    run = one_process(emulated(arguments(corpus, 4, 2, *SKIPPING, iters=8)), within=weights_compared_and_one_skipped)
    assert run.skipped == [0, 0, 0, 1, 0, 0, 0, 0]


def test_with_the_distributed_optimizer_it_is_the_same(pool: GetPool, corpus: str) -> None:
    argv = arguments(corpus, 2, 2, *SKIPPING, dp=2)
    whole = pool(4).run("train", argv=argv, within=OVERFLOW)
    assert sum(whole[-1].skipped) == 1
    for flags in ([], ["--overlap-grad-reduce", "--overlap-param-gather"]):
        shared = pool(4).run("train", argv=[*argv, "--use-distributed-optimizer", *flags], within=OVERFLOW)
        assert_same_bits(whole, shared)
