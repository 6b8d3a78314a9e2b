"""Quantised weights, cached as Transformer Engine caches them, are those of the newest weights wherever they are read."""

from __future__ import annotations

from functools import partial

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
)
from tests.support.quantized import quantized_linears

CACHED, DIRECT = partial(quantized_linears, cached=True), partial(quantized_linears, cached=False)
STALE = partial(quantized_linears, cached=True, renewed=False)


@pytest.mark.parametrize("more", [[], ["--paci-extra-in-flight", "2"]], ids=["paci", "more-in-flight"])
@pytest.mark.parametrize(("num_stages", "a"), [(4, 1), (4, 3)])
def test_forwards_and_backwards_read_the_newest_weights(
    corpus: str, one_process: OneProcess, num_stages: int, a: int, more: list[str]
) -> None:
    """The reference quantises whenever it computes. Between the drain's updates backwards follow without a forward."""
    argv = emulated([*arguments(corpus, num_stages, a), *PACI, *more])
    cached, reference = one_process(argv, within=CACHED), one_process(argv, within=DIRECT)
    assert cached.losses == reference.losses
    assert_same_weights(cached.stage_weights, reference.stage_weights)
    if a > 1:  # else every forward is the first of a window
        assert one_process(argv, within=STALE).losses != reference.losses, "copies of a window's first weights do as well"


def test_processes_are_the_emulation_and_drained_megatrons_flush(
    pool: GetPool, corpus: str, one_process: OneProcess
) -> None:
    workers, argv = pool(2), arguments(corpus, 2, 3)
    processes = workers.run("train", argv=[*argv, *PACI], within=CACHED)
    assert_same_run(processes, one_process(emulated([*argv, *PACI]), within=CACHED))
    flush = workers.run("train", argv=argv, within=CACHED)
    drained = workers.run("train", argv=[*argv, *PACI, "--paci-drain-interval", "1"], within=CACHED)
    assert_same_bits(flush, drained)
    assert processes[-1].losses[2:] != flush[-1].losses[2:], "no drift: paci did not run ahead"
