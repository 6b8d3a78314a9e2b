"""Muon with --use-distributed-optimizer: each rank of a stage steps whole layers, and the norm is the stage's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from tests.support.helpers import PACI, GetPool, arguments, assert_same_bits, assert_same_run, emulated
from tests.support.look_ahead import OVERFLOW
from tests.support.model_function import from_a_function

MUON = ["--optimizer", "muon", "--bf16"]
LAYER_WISE = [*MUON, "--use-distributed-optimizer"]
SKIPPING = ["--no-check-for-nan-in-loss-and-grad", "--paci-look-ahead", "--paci-drain-interval", "4"]


@contextlib.contextmanager
def from_a_function_and_one_skipped() -> Iterator[None]:
    with from_a_function(), OVERFLOW():
        yield


def test_drained_it_is_megatrons_flush_and_else_the_muon_that_is_whole_on_every_rank(pool: GetPool, corpus: str) -> None:
    """With tied embeddings."""
    tied = arguments(corpus, 2, 2, dp=2)
    tied.remove("--untie-embeddings-and-output-weights")
    run = pool(4).run
    whole = run("train", argv=[*tied, *MUON, *PACI])
    for within in (None, from_a_function):
        parts = run("train", argv=[*tied, *LAYER_WISE, *PACI], within=within, count_collectives=True)
        assert [part.collectives for part in parts] == [{}] * 4, "a collective across stages between drains"
        assert_same_bits(whole, parts)
        flush = run("train", argv=[*tied, *LAYER_WISE], within=within)
        drained = run("train", argv=[*tied, *LAYER_WISE, *PACI, "--paci-drain-interval", "1"], within=within)
        assert_same_bits(flush, drained)
        np.testing.assert_allclose(np.array(drained[-1].norms, float), np.array(flush[-1].norms, float), rtol=1e-6)


def test_its_emulation_looks_ahead_and_skips_as_it_does(pool: GetPool, corpus: str) -> None:
    """And as the Muon that is whole on every rank, which looks ahead from the same main parameters."""
    argv = arguments(corpus, 2, 2, *PACI, *SKIPPING, dp=2)
    whole = pool(4).run("train", argv=[*argv, *MUON], within=OVERFLOW)
    for within in (OVERFLOW, from_a_function_and_one_skipped):
        parts = pool(4).run("train", argv=[*argv, *LAYER_WISE], within=within)
        assert sum(parts[-1].skipped) == 1
        assert_same_bits(whole, parts)
        one = pool(2).run("train", argv=emulated([*argv, *LAYER_WISE]), within=within)
        for rank in range(2):
            assert_same_run([parts[rank], parts[2 + rank]], one[rank])
