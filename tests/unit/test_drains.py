"""The pipeline drains where Megatron's loop needs it empty, and nowhere else."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from paci_megatron.plugin.drains import Drains


def drains(drain_interval: int | None = None, counts: Any = lambda n: 4, **changes: Any) -> list[int]:
    """The iterations up to 30 after which a run of 30 with these arguments drains."""
    quiet: dict[str, Any] = {
        "iteration": 0,
        "train_iters": 30,
        "eval_interval": None,
        "do_valid": True,
        "start_eval_at_iter": None,
        "save": None,
        "save_interval": None,
        "non_persistent_save_interval": None,
        "exit_interval": None,
        "phase_transition_iterations": None,
        "iterations_to_skip": [],
        "check_weight_hash_across_dp_replicas_interval": None,
        "gpu_sniff_test_interval": None,
        "adlr_autoresume": False,
        "adlr_autoresume_interval": 1000,
        "distributed_timeout_seconds_after_init": None,
        "step_batch_size_schedule": None,
        "paci_start_iteration": 0,
        "paci_fallback": 0,
    }
    drains_of_run = Drains(argparse.Namespace(**{**quiet, **changes}), drain_interval, counts)
    return [n for n in range(1, 31) if drains_of_run.is_drain(n)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [30]),
        ({"eval_interval": 10}, [10, 20, 30]),
        ({"eval_interval": 10, "do_valid": False}, [30]),
        ({"eval_interval": 10, "start_eval_at_iter": 15}, [20, 30]),
        ({"save": "ckpt", "save_interval": 12}, [12, 24, 30]),
        ({"save_interval": 12}, [30]),
        ({"save": "ckpt", "save_interval": 25, "non_persistent_save_interval": 11}, [11, 22, 25, 30]),
        ({"exit_interval": 17}, [17, 30]),
        ({"phase_transition_iterations": [5, 9]}, [5, 9, 30]),
        ({"iterations_to_skip": [8]}, [7, 30]),
        ({"check_weight_hash_across_dp_replicas_interval": 14}, [14, 28, 30]),
        ({"gpu_sniff_test_interval": 14}, [14, 28, 30]),
        ({"adlr_autoresume": True, "adlr_autoresume_interval": 12}, [12, 24, 30]),
        ({"adlr_autoresume_interval": 12}, [30]),
        ({"distributed_timeout_seconds_after_init": 60}, [1, 30]),
        ({"distributed_timeout_seconds_after_init": 60, "iteration": 4}, [5, 30]),
    ],
)
def test_each_reason_to_drain(changes: dict[str, Any], expected: list[int]) -> None:
    assert drains(**changes) == expected


def test_drain_interval() -> None:
    assert drains(drain_interval=13) == [13, 26, 30]
    assert drains(drain_interval=1) == list(range(1, 31))


def test_drains_before_the_microbatch_count_changes() -> None:
    assert drains(counts=lambda n: 4 if n < 6 else 8, step_batch_size_schedule="0:8 48:16") == [6, 30]
