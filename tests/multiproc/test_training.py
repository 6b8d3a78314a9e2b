"""Invariants of whole training runs on processes, against Megatron's own schedule."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.schedule.schedules import max_drift, max_in_flight
from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support import interruptions
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, emulated, slow
from tests.support.pool import JobError


@pytest.mark.parametrize(("num_stages", "a"), [(2, 3), (4, 1), (4, 3), *slow((2, 1), (2, 2), (4, 6))])
def test_drain_at_every_update_is_megatrons_flush_bit_for_bit(pool: GetPool, corpus: str, num_stages: int, a: int) -> None:
    workers = pool(num_stages)
    flush = workers.run("train", argv=arguments(corpus, num_stages, a))
    drained = workers.run("train", argv=[*arguments(corpus, num_stages, a), *PACI, "--paci-drain-interval", "1"])
    assert len(flush[-1].losses) == 6
    assert len(flush[-1].evaluations) == 2
    assert_same_bits(flush, drained)


def test_without_the_flag_training_is_bare_megatron_bit_for_bit(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    workers = pool(2)
    on_cpu = [
        *("--distributed-backend", "gloo", "--transformer-impl", "local", "--attention-backend", "unfused"),
        *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-bias-gelu-fusion"),
        *("--no-bias-dropout-fusion", "--no-persist-layer-norm", "--no-rope-fusion", "--no-bias-swiglu-fusion"),
    ]
    bare = workers.run("train", argv=[*arguments(corpus, 2, 2), *on_cpu], plugin=False)
    plugged = workers.run("train", argv=[*arguments(corpus, 2, 2), "--paci-metrics-file", str(tmp_path / "metrics.jsonl")])
    assert_same_bits(bare, plugged)


@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 2)])
def test_same_run_twice_gives_the_same_bits_and_differs_from_flush(
    pool: GetPool, corpus: str, num_stages: int, a: int
) -> None:
    workers = pool(num_stages)
    once, again = (workers.run("train", argv=[*arguments(corpus, num_stages, a), *PACI]) for _ in range(2))
    assert_same_bits(once, again)
    flush = workers.run("train", argv=arguments(corpus, num_stages, a))
    assert once[-1].losses[0] == flush[-1].losses[0], "the first window has seen no update"
    assert once[-1].losses != flush[-1].losses, "no drift: paci did not run ahead"


@pytest.mark.parametrize(("num_stages", "dp"), [(2, 1), (4, 1), (2, 2)])
def test_no_collective_crosses_stages_between_drains(pool: GetPool, corpus: str, num_stages: int, dp: int) -> None:
    workers = pool(num_stages * dp)
    argv = arguments(corpus, num_stages, 2, "--eval-interval", "6", iters=12, dp=dp)
    argv[argv.index("--clip-grad") + 1] = "1.0"
    paci = workers.run("train", argv=[*argv, *PACI, "--paci-clip-mode", "stage"], count_collectives=True)
    assert [result.collectives for result in paci] == [{}] * len(paci)
    # The same counter on Megatron's own train step finds what there is to find.
    flush = workers.run("train", argv=argv, count_collectives=True)
    assert all(sum(result.collectives.values()) >= 12 for result in flush)
    if dp > 1:
        assert all(result.collectives_within_stage >= 12 for result in paci), "gradients are still reduced over replicas"


def drains(pool: GetPool, corpus: str, path: Path, num_stages: int, a: int, interval: int) -> list[dict[str, Any]]:
    """What each stage measured up to each drain of a run of 12 updates that drains after every ``interval``."""
    argv = arguments(corpus, num_stages, a, "--eval-interval", str(interval), iters=12)
    pool(num_stages).run("train", argv=[*argv, *PACI, "--paci-metrics-file", str(path)])
    header, *events = read_metrics(path)
    said = {"event": "run", "schedule": "paci", "iteration": 0, "num_stages": num_stages, "microbatches_per_update": a}
    assert said.items() <= header.items() and f"schedule paci: {num_stages} stages" in " ".join(header["set_up"])
    assert header["versions"].keys() >= {"paci-megatron", "megatron-core", "torch"} and header["command"]
    events = [event for event in events if event["event"] == "drain"]
    assert [event["iteration"] for event in events] == list(range(interval, 13, interval))
    return events


@pytest.mark.parametrize(("num_stages", "a"), [(2, 2), (4, 1), *slow((4, 2), (4, 4))])
def test_measured_drift_and_in_flight_are_the_schedules(
    pool: GetPool, corpus: str, tmp_path: Path, num_stages: int, a: int
) -> None:
    by_six = drains(pool, corpus, tmp_path / "six.jsonl", num_stages, a, interval=6)
    for event in by_six:
        for stage, report in enumerate(event["stages"]):
            assert report["updates"] == 6
            assert report["max_drift"] == max_drift(stage, num_stages, a)
            assert 0 <= report["mean_weight_change"] <= report["max_weight_change"] < 1
            assert (report["mean_weight_change"] > 0) == (report["max_drift"] > 0)
            assert report["max_in_flight"] == max_in_flight(stage, num_stages)
            assert 0 <= report["bubble_fraction"] <= 1
    # Filling and draining cost the same drift in 12 updates as in 6, so what 12 have more is 6 updates of steady state.
    (by_twelve,) = drains(pool, corpus, tmp_path / "twelve.jsonl", num_stages, a, interval=12)
    for stage, (long, short) in enumerate(zip(by_twelve["stages"], by_six[0]["stages"], strict=True)):
        total = 12 * a * long["mean_drift"] - 6 * a * short["mean_drift"]
        steady = Fraction(total).limit_denominator(1000) / (6 * a)
        assert steady == Fraction(num_stages - 1 - stage, a), f"stage {stage}"


def test_a_plan_is_checked_before_its_first_action(one_process: OneProcess, corpus: str) -> None:
    with pytest.raises(JobError, match="PlanError: stage 1, action F1: 2 micro-batches in flight, at most 1") as caught:
        one_process(emulated([*arguments(corpus, 2, 2), *PACI]), within=interruptions.one_more_in_flight)
    assert "training.train(" not in str(caught.value), "training had begun"


def test_going_beyond_a_bound_stops_the_run_and_shows_the_plan(one_process: OneProcess, corpus: str) -> None:
    with pytest.raises(JobError) as caught:
        one_process(emulated([*arguments(corpus, 2, 2), *PACI]), within=interruptions.no_drift_allowed)
    assert "stage 0: drift of 1 updates, the schedule allows 0" in str(caught.value)
    assert re.search(r"^stage 0: F0 .* B2 .*\nstage 1: .* F0 .* B2 ", str(caught.value), re.M)
