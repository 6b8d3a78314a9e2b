"""What --paci-trace-dir writes: every action of the plan once, in order, on every stage, and the same training."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from paci_megatron.schedule import Kind, one_f_one_b_flush
from paci_megatron.schedule.actions import TRANSFER_KINDS
from paci_megatron.telemetry.metrics_file import read_metrics
from paci_megatron.telemetry.trace_file import EMBEDDING, LOSS, Stretch, layer_part, read_trace, trace_path
from paci_megatron.telemetry.trace_layers import layer_counts
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_weights, emulated
from tests.support.plans import plans_of

ITERATIONS, DRAIN = 5, 3  # one drain on the way, one at the end
DRAINED = ["--eval-interval", str(DRAIN), *PACI]


def assert_is_the_plan(trace: list[Stretch], num_stages: int, a: int) -> None:
    """Two stretches, each action of each once and in order, with times that fit together."""
    assert [(stretch.first, stretch.last) for stretch in trace] == [(1, DRAIN), (DRAIN + 1, ITERATIONS)]
    for stretch in trace:
        plans = plans_of(num_stages, a, stretch.last - stretch.first + 1, gradients_ahead=True)
        for stage, plan in zip(stretch.stages, plans, strict=True):
            assert [traced.action for traced in stage.actions] == plan
            update = stretch.first
            for traced in stage.actions:
                assert traced.iteration == update
                update += traced.action.kind is Kind.UPDATE
                assert min(traced.waiting_s, traced.compute_s, traced.transfer_s) >= 0
                assert (traced.transfer_s if traced.action.kind not in TRANSFER_KINDS else traced.compute_s) == 0
            for before, after in pairwise(stage.actions):
                assert after.start_s >= before.end_s - 1e-6, "written to a tenth of a microsecond"


def assert_layers_add_up(stretch: Stretch, num_layers: int) -> None:
    """Every part of the model on one stage; together they took what the forwards and backwards took."""
    places: Counter[str] = Counter()
    for stage in stretch.stages:
        places.update({part for event in stage.layers for part in event["forward_s"]})
        for event in stage.layers:
            for kind, name in ((Kind.FORWARD, "forward"), (Kind.BACKWARD, "backward")):
                performed = [
                    traced.compute_s
                    for traced in stage.between(event["iteration"], event["iteration"])
                    if traced.action.kind is kind
                ]
                assert event[f"{name}s"] == len(performed)
                assert sum(event[f"{name}_s"].values()) == pytest.approx(sum(performed), abs=1e-5)
                assert min(event[f"{name}_s"].values(), default=0) >= 0
    once = [EMBEDDING, *(layer_part(number) for number in range(1, num_layers + 1)), LOSS]
    assert {part: places[part] for part in once} == dict.fromkeys(once, 1)


def test_trace_of_processes(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    argv = [*arguments(corpus, 2, 2, iters=ITERATIONS), *DRAINED]
    traced = pool(2).run("train", argv=[*argv, "--paci-trace-dir", str(tmp_path / "trace")])
    trace = read_trace(tmp_path / "trace")
    assert_is_the_plan(trace, 2, 2)
    for stretch in trace:
        assert_layers_add_up(stretch, num_layers=4)
    assert any(t.waiting_s > 0 for s in trace[0].stages for t in s.actions), "in a fill the last stage waits"
    assert_same_bits(traced, pool(2).run("train", argv=argv))


@pytest.mark.parametrize("recompute", [(), ("--recompute-granularity", "full", "--recompute-method", "uniform")])
def test_trace_of_emulated_stages(corpus: str, one_process: OneProcess, tmp_path: Path, recompute: tuple[str, ...]) -> None:
    argv = [*emulated(arguments(corpus, 4, 3, iters=ITERATIONS)), *DRAINED, *recompute]
    argv += ["--recompute-num-layers", "1"] if recompute else []
    traced = one_process([*argv, "--paci-trace-dir", str(tmp_path / "trace")])
    trace = read_trace(tmp_path / "trace")
    assert_is_the_plan(trace, 4, 3)
    for stretch in trace:
        assert_layers_add_up(stretch, num_layers=4)
    plain = one_process(argv)
    assert traced.losses == plain.losses and traced.evaluations == plain.evaluations
    assert_same_weights(traced.stage_weights, plain.stage_weights)


def test_trace_of_megatrons_own_schedule(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    argv = [*arguments(corpus, 2, 3, iters=ITERATIONS), "--eval-interval", str(DRAIN)]
    traced = pool(2).run("train", argv=[*argv, "--paci-trace-dir", str(tmp_path / "trace")])
    trace = read_trace(tmp_path / "trace")
    assert (trace[0].first, trace[-1].last, trace[0].schedule) == (1, ITERATIONS, "1f1b")
    for stretch in trace:
        assert_layers_add_up(stretch, num_layers=4)
        for index, stage in enumerate(stretch.stages):
            plan = one_f_one_b_flush(index, 2, 3)
            assert [traced.action for traced in stage.actions] == [next(plan) for _ in stage.actions]
            assert sum(traced.action.kind is Kind.UPDATE for traced in stage.actions) == stretch.last - stretch.first + 1
    assert_same_bits(traced, pool(2).run("train", argv=argv))


def test_a_resumed_run_appends_behind_what_a_kill_has_left(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "trace", str(tmp_path / "checkpoint")
    more = ["--save-interval", str(DRAIN), "--override-opt-param-scheduler", *DRAINED, "--paci-trace-dir", str(folder)]
    pool(2).run("train", argv=[*arguments(corpus, 2, 2, iters=DRAIN), *more, "--save", checkpoint])
    with open(trace_path(folder, 1), "a", encoding="utf-8") as stream:
        stream.write('{"event": "action", "iterati')
    pool(2).run("train", argv=[*arguments(corpus, 2, 2, iters=ITERATIONS), *more, "--load", checkpoint])
    assert_is_the_plan(read_trace(folder), 2, 2)
    events = [event["event"] for event in read_metrics(trace_path(folder, 1))]
    assert (events.count("plan"), events.count("drain")) == (2, 2)


def test_the_layers_of_a_layout_with_a_stage_of_loss_only(corpus: str, one_process: OneProcess, tmp_path: Path) -> None:
    """What ``tools/plan_schedule.py --balance`` may ask for: a large vocabulary's loss as a stage of its own."""
    layout = ["--pipeline-model-parallel-layout", "Et*3|t|L"]
    argv = [*emulated(arguments(corpus, 3, 3, iters=ITERATIONS)), *DRAINED, *layout]
    traced = one_process([*argv, "--paci-trace-dir", str(tmp_path)])
    trace = read_trace(tmp_path)
    assert_is_the_plan(trace, 3, 3)
    assert [layer_counts(stretch) for stretch in trace] == [[4, 1, 1]] * 2
    assert_layers_add_up(trace[0], num_layers=4)
    assert traced.losses == one_process(argv).losses
