"""``--paci-extra-in-flight auto``: what the run chooses, and the same again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paci_megatron.telemetry.metrics_file import read_metrics
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
from tests.support.slow_links import slow_links

MEASURED = 10
"""Updates before the first choice: 2L + 8 with a record lag of 1."""


def choices(metrics: Path) -> list[dict[str, Any]]:
    return [event for event in read_metrics(metrics) if event["event"] == "slack"]


@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 4)])
def test_a_run_measures_chooses_and_can_be_done_again(
    pool: GetPool, corpus: str, one_process: OneProcess, tmp_path: Path, num_stages: int, a: int
) -> None:
    """Again on processes, which measure nothing then, and in one process, bit for bit."""
    metrics = tmp_path / "metrics.jsonl"
    argv = [*arguments(corpus, num_stages, a, iters=MEASURED + 6), *PACI, "--clip-grad", "0.5", "--paci-extra-in-flight"]
    budget = ["--paci-memory-budget", str(num_stages + 2), "--paci-metrics-file", str(metrics)]
    run = pool(num_stages).run("train", argv=[*argv, "auto", *budget], within=slow_links)
    (choice,) = choices(metrics)
    assert choice["iteration"] == MEASURED and sum(choice["slack"]) == 2, "links of a second take all that there is"
    assert len(choice["forward_ms"]) == num_stages and choice["latency_ms"] == [1000] * (num_stages - 1)
    assert min(*choice["forward_ms"], *choice["backward_ms"], *choice["update_ms"]) > 0
    drains = [event["stages"] for event in read_metrics(metrics) if event["event"] == "drain"]
    assert [stages[0]["max_in_flight"] for stages in drains] == [num_stages, num_stages + 2]

    again = pool(num_stages).run("train", argv=[*argv, str(metrics)])
    assert_same_bits(run, again)
    assert_same_run(again, one_process(emulated([*argv, str(metrics)])))
    without = pool(num_stages).run("train", argv=[*argv, "0", "--paci-drain-interval", str(MEASURED)])
    assert run[-1].losses[:MEASURED] == without[-1].losses[:MEASURED] and run[-1].losses != without[-1].losses


def test_a_budget_in_bytes_is_kept(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    argv = [*arguments(corpus, 2, 2, iters=MEASURED + 6), *PACI, "--paci-extra-in-flight", "auto"]
    argv += ["--paci-metrics-file", str(metrics), "--paci-memory-budget"]
    pool(2).run("train", argv=[*argv, "1kB"], within=slow_links)
    (choice,) = choices(metrics)
    each = choice["bytes_per_microbatch"]
    assert choice["slack"] == [0] and each > 1000, "nothing more fits"
    pool(2).run("train", argv=[*argv, f"{3.5 * each / 1000}kB"], within=slow_links)
    assert choices(metrics)[-1]["slack"] == [1], "three fit"
    peaks = [event["saved_activation_bytes"][0] for event in read_metrics(metrics) if event["event"] == "memory"]
    assert peaks[0] == 2 * each


def test_a_resumed_run_keeps_what_was_chosen(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    metrics, iters = tmp_path / "metrics.jsonl", MEASURED + 6
    at = ["--save-interval", str(MEASURED + 2), "--save", str(tmp_path / "saved"), "--load", str(tmp_path / "saved")]
    argv = [*arguments(corpus, 2, 2, iters=iters), *PACI, "--paci-extra-in-flight"]
    auto = [*argv, "auto", "--paci-metrics-file", str(metrics), *at]
    pool(2).run("train", argv=[*auto, "--exit-interval", str(MEASURED + 2)], within=slow_links)
    rest = pool(2).run("train", argv=auto, within=slow_links)
    assert len(choices(metrics)) == 1
    whole = pool(2).run("train", argv=[*argv, str(metrics), "--paci-drain-interval", str(MEASURED + 2)])
    assert rest[-1].losses == whole[-1].losses[MEASURED + 2 :]
    assert_same_weights([rank.weights for rank in rest], [rank.weights for rank in whole])
