"""N stages in one process are N processes, and both are the reference, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paci_megatron.schedule.schedules import max_drift
from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_run, assert_same_weights, emulated, slow

SIZES = [(num_stages, a) for num_stages in (2, 4) for a in (1, 2, 3, 8)]


def emulation(corpus: str, num_stages: int, a: int, *more: str, **settings: Any) -> list[str]:
    """The arguments of a run with its stages in one process."""
    return emulated(arguments(corpus, num_stages, a, *more, **settings))


def without_dropout(argv: list[str], num_layers: int) -> list[str]:
    """The reference knows nothing of random number streams."""
    off = ["--attention-dropout", "0", "--hidden-dropout", "0", "--weight-decay", "0", "--num-layers", str(num_layers)]
    return [*argv, *off]


@pytest.mark.parametrize(("num_stages", "a"), SIZES)
def test_emulated_stages_are_processes(pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int) -> None:
    processes = pool(num_stages).run("train", argv=[*arguments(corpus, num_stages, a), *PACI])
    assert_same_run(processes, one_process([*emulation(corpus, num_stages, a), *PACI]))


@pytest.mark.parametrize("num_stages", [2, 4])
def test_emulated_flush_is_megatrons_on_processes(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int
) -> None:
    processes = pool(num_stages).run("train", argv=arguments(corpus, num_stages, 3))
    assert_same_run(processes, one_process(emulation(corpus, num_stages, 3)))


@pytest.mark.parametrize(("stages", "a"), [*SIZES, (8, 4), (16, 3), *slow((8, 1), (8, 8), (16, 16))])
def test_emulated_stages_are_the_reference(corpus: str, one_process: OneProcess, stages: int, a: int) -> None:
    argv = without_dropout([*emulation(corpus, stages, a), *PACI], num_layers=max(stages, 4))
    run, reference = one_process(argv), one_process(argv, job="train_by_reference")
    assert len(run.losses) == 6 and run.losses == reference.losses
    assert_same_weights(run.stage_weights, reference.stage_weights)


@pytest.mark.parametrize(("num_stages", "a", "extra"), [(2, 2, "1"), (4, 2, "7"), (4, 3, "0,2,1")])
def test_more_in_flight_is_the_reference_on_processes_and_emulated(
    pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int, a: int, extra: str
) -> None:
    more = ["--paci-extra-in-flight", extra, "--clip-grad", "0.5", *PACI]
    run = one_process(without_dropout([*emulation(corpus, num_stages, a), *more], num_layers=4))
    argv = without_dropout([*arguments(corpus, num_stages, a), *more], num_layers=4)
    assert_same_run(pool(num_stages).run("train", argv=argv), run)
    reference = one_process(emulated(argv), job="train_by_reference")
    assert len(run.losses) == 6 and run.losses == reference.losses
    assert_same_weights(run.stage_weights, reference.stage_weights)
    without_extra = one_process(without_dropout([*emulation(corpus, num_stages, a), *more[2:]], num_layers=4))
    assert run.losses != without_extra.losses


def test_transfers_in_bf16_are_rounded_alike_on_processes_and_emulated(
    pool: GetPool, corpus: str, one_process: OneProcess
) -> None:
    rounded = [*PACI, "--paci-transfer-dtype", "bf16"]
    processes = pool(2).run("train", argv=[*arguments(corpus, 2, 2), *rounded])
    assert_same_run(processes, one_process([*emulation(corpus, 2, 2), *rounded]))
    whole = one_process([*emulation(corpus, 2, 2), *PACI])
    assert processes[-1].losses != whole.losses == pytest.approx(processes[-1].losses, rel=1e-2)


@pytest.mark.parametrize(("policy", "stages", "a"), [("stash", 4, 1), ("stash", 4, 3), ("double-buffer", 4, 3)])
def test_other_weight_policies_are_the_reference(
    corpus: str, one_process: OneProcess, tmp_path: Path, policy: str, stages: int, a: int
) -> None:
    argv = without_dropout([*emulation(corpus, stages, a, "--paci-weight-policy", policy), *PACI], num_layers=4)
    metrics = tmp_path / "metrics.jsonl"
    run = one_process([*argv, "--paci-metrics-file", str(metrics)])
    reference = one_process(argv, job="train_by_reference")
    paci = one_process(without_dropout([*emulation(corpus, stages, a), *PACI], num_layers=4))
    assert run.losses == reference.losses != paci.losses
    assert_same_weights(run.stage_weights, reference.stage_weights)
    # The last stage has nothing in flight over an update; 2BW copies there too, so that all stages are one version.
    (drain,) = [event for event in read_metrics(metrics) if event["event"] == "drain"]
    copies = [max_drift(s, stages, a) if policy == "stash" else 1 for s in range(stages)]
    for stage, weights, count in zip(drain["stages"], run.stage_weights, copies, strict=True):
        assert stage["max_drift"] == 0
        assert stage["copied_weight_bytes"] == count * sum(weight.nbytes for weight in weights.values())


def test_checkpoints_of_emulated_stages_and_processes_are_the_same(
    pool: GetPool, corpus: str, one_process: OneProcess, tmp_path: Path
) -> None:
    resumable = ["--save-interval", "3", "--override-opt-param-scheduler", *PACI]

    def saving(folder: str) -> list[str]:
        return [*resumable, "--save", str(tmp_path / folder)]

    whole = pool(2).run("train", argv=[*arguments(corpus, 2, 2), *saving("whole")])
    emulated_half = one_process([*emulation(corpus, 2, 2, iters=3), *saving("emulated")])
    assert emulated_half.losses == whole[-1].losses[:3]
    resumed = pool(2).run("train", argv=[*arguments(corpus, 2, 2), *resumable, "--load", str(tmp_path / "emulated")])
    assert resumed[-1].losses == whole[-1].losses[3:]
    assert_same_weights([r.weights for r in resumed], [r.weights for r in whole])

    pool(2).run("train", argv=[*arguments(corpus, 2, 2, iters=3), *saving("processes")])
    in_one = one_process([*emulation(corpus, 2, 2), *resumable, "--load", str(tmp_path / "processes")])
    assert in_one.losses == whole[-1].losses[3:]
    assert_same_weights(in_one.stage_weights, [r.weights for r in whole])
