"""In steady state the host waits for the device once an update and stage, for the gradient norm."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, emulated, without
from tests.support.waits import counted, device_synchronizations

FIRST, LAST = 3, 9


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--calculate-per-token-loss"],
        ["--paci-fallback", "3"],
        ["--bf16"],
    ],
    ids=lambda more: "-".join(more).strip("-") or "default",
)
def test_the_host_waits_once_an_update(one_process: OneProcess, corpus: str, tmp_path: Path, more: list[str]) -> None:
    argv = without(arguments(corpus, 2, 3, *more, "--clip-grad", "1.0", iters=12), "--log-interval")
    path = tmp_path / "waits.json"
    within = partial(counted, path=str(path), first=FIRST, last=LAST)
    one_process([*emulated(argv), "--log-interval", "100", *PACI], within=within)
    places = json.loads(path.read_text())
    # Clipping by the norm of a few updates ago and a check of every loss and gradient included.
    assert places == {"clip_grads.py:get_grad_norm_fp32": 2 * (LAST - FIRST)}


def test_megatrons_own_loop_waits_more_often(one_process: OneProcess, corpus: str, tmp_path: Path) -> None:
    """So the count sees what there is to see."""
    argv = without(arguments(corpus, 1, 3, iters=12), "--log-interval")
    path = tmp_path / "waits.json"
    one_process([*argv, "--log-interval", "100"], within=partial(counted, path=str(path), first=FIRST, last=LAST))
    places = json.loads(path.read_text())
    assert sum(places.values()) > 10 * (LAST - FIRST)


@pytest.mark.parametrize(("schedule", "synchronizes"), [(PACI, False), ([], True)], ids=["paci", "1f1b"])
def test_nothing_synchronizes_the_device_between_drains(
    pool: GetPool, corpus: str, tmp_path: Path, schedule: list[str], synchronizes: bool
) -> None:
    """Log lines in every iteration, every option that would synchronise. Megatron's own schedule shows what is counted."""
    more = ["--train-sync-interval", "1", "--empty-unused-memory-level", "2", "--clip-grad", "1.0", *schedule]
    path = tmp_path / "synchronizations.json"
    within = partial(device_synchronizations, path=str(path), first=FIRST, last=LAST)
    pool(2).run("train", argv=[*arguments(corpus, 2, 3, iters=12), *more], within=within)
    assert (json.loads(path.read_text()) > 0) == synchronizes
