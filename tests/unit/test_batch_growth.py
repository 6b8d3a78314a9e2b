"""What is said of a batch that grows during training."""

from __future__ import annotations

import argparse

import pytest
from megatron.core import num_microbatches_calculator

from paci_megatron.config import PaciConfig
from paci_megatron.plugin.batch_growth import calculator, growth_warning


def arguments(schedule: str | None, **changes: int) -> argparse.Namespace:
    values = {"micro_batch_size": 2, "data_parallel_size": 2, "gtp_weight_remat_size": 1, "seq_length": 10}
    values |= {"train_iters": 100, "paci_start_iteration": 0, **changes}
    return argparse.Namespace(step_batch_size_schedule=schedule, decrease_batch_size_if_needed=False, **values)


def test_the_iteration_is_the_first_with_the_final_drift() -> None:
    # 8 stages, 4 sequences a micro-batch of all replicas: a = 1, 4, 8 and 16, so drifts of 7, 2, 1 and 1.
    args = arguments("0:4 100:16 990:32 9000:64")
    (line,) = growth_warning(PaciConfig(8), args)
    assert "up to 7 updates with 1 micro-batches, and 1 from iteration 10 on with 16" in line
    assert "--paci-start-iteration 9, 9.0% of the iterations" in line
    # Megatron's own calculator agrees on where that is.
    sizes, consumed, counts = calculator(args), 0, []
    for _ in range(12):
        sizes.update(consumed, consistency_check=False)
        counts.append(sizes.get())
        consumed += sizes.get_current_running_global_batch_size()
    assert counts.index(8) == 9, "counted from 0"
    assert num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR is None, "nothing of Megatron's is touched"


@pytest.mark.parametrize(
    ("schedule", "config", "start"),
    [
        (None, PaciConfig(8), 0),
        ("0:4 100:16", PaciConfig(8, schedule="1f1b"), 0),
        ("0:28 100:64", PaciConfig(8), 0),  # a drift of 1 from the beginning
        ("0:64 100:4", PaciConfig(8), 0),  # the batch shrinks
        ("0:4 100:16 990:32", PaciConfig(8), 9),  # it flushes until then already
    ],
)
def test_nothing_is_said_where_drift_does_not_fall(schedule: str | None, config: PaciConfig, start: int) -> None:
    assert growth_warning(config, arguments(schedule, paci_start_iteration=start)) == []
