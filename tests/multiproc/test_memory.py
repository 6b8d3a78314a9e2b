"""PACI needs the memory of 1F1B-flush: the same activations, and no second copy of weights."""

from __future__ import annotations

import pytest

from tests.support.helpers import PACI, GetPool, arguments


@pytest.mark.parametrize("num_stages", [2, 4])
def test_peak_memory_is_that_of_flush(pool: GetPool, corpus: str, num_stages: int) -> None:
    # Weights larger than anything else, so that a copy of one would be counted.
    argv = [*arguments(corpus, num_stages, 4), "--hidden-size", "64", "--micro-batch-size", "1", "--global-batch-size", "4"]
    flush = pool(num_stages).run("train", argv=argv, measure_memory=True)
    paci = pool(num_stages).run("train", argv=[*argv, *PACI], measure_memory=True)
    for stage in range(num_stages):
        assert paci[stage].peak_saved_bytes == flush[stage].peak_saved_bytes > 0, f"stage {stage}"
        assert paci[stage].peak_weight_sized_tensors == flush[stage].peak_weight_sized_tensors > 0, f"stage {stage}"
    # The first stage holds N micro-batches in flight, the last one.
    assert paci[0].peak_saved_bytes > paci[-1].peak_saved_bytes
