"""The throughput benchmark without processes: what it measures, in which order, and what it makes of the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.benchmark import main
from lab.benchmark.jobs import Job, RankResult
from lab.benchmark.padding import Padding, StageTimes
from lab.benchmark.rows import Measured, make_rows, measured_costs, overrun_warning, table
from lab.benchmark.settings import (
    REAL_MODEL,
    TIMED_MODEL,
    Case,
    Settings,
    find_arm,
    parse_stage_ms,
)
from paci_megatron.schedule import Kind
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.usage import UsageError

TIMED = Settings(("1f1b", "paci", "interleaved:2"), (4,), (4,), TIMED_MODEL, stage_ms=((100, 200),), jitter=0.2, seed=3)


class Clock:
    """Time that passes only by sleeping, each time ``late_s`` longer than asked for, and by computing."""

    def __init__(self, late_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds + self.late_s

    def compute(self, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.now_s += seconds

        return work


def padding(times: StageTimes, clock: Clock, stage_index: int = 0) -> Padding:
    return Padding(times, stage_index, clock, clock.sleep)


@pytest.mark.parametrize("name", ["1f1b", "paci", "paci:1", "interleaved:2", "paci-v"])
def test_timed_actions_take_what_the_simulator_says_they_take(name: str) -> None:
    arm, costs = find_arm(name), Costs((StageCosts(0.1, 0.2),) * 4, jitter=0.2, seed=7)
    simulation = arm.plan.simulate(4, 3, costs, record=True)
    for stage, run in enumerate(simulation.stages):
        clock = Clock()
        padded = padding(StageTimes(0.1, 0.2, jitter=0.2, seed=7, chunks=arm.plan.chunks), clock, stage)
        for span in run.spans:
            begin_s = clock()
            if span.action.kind is Kind.UPDATE:
                padded.skip_update()
            else:
                step = padded.forward if span.action.kind is Kind.FORWARD else padded.backward
                step(clock.compute(0.01))
                assert clock() - begin_s == pytest.approx(span.end_s - span.start_s)


def test_a_late_sleep_is_made_up_for_by_the_next_action() -> None:
    clock = Clock(late_s=0.004)
    padded = padding(StageTimes(0.1, 0.2), clock)
    for _ in range(10):
        padded.forward(clock.compute(0.03))
        padded.backward(clock.compute(0.06))
    assert clock() == pytest.approx(10 * (0.1 + 0.2) + 0.004)  # only the last one is late
    assert padded.take_counts() == (20, 0)


def test_lateness_is_kept_until_there_is_time_to_make_up_for_it() -> None:
    clock = Clock(late_s=0.05)
    padded = padding(StageTimes(0.1, 0.2), clock)
    padded.forward(clock.compute(0.0))
    clock.late_s = 0.0
    padded.forward(clock.compute(0.08))  # leaves 0.02 s of the 0.05 s
    assert clock() == pytest.approx(0.15 + 0.08)
    padded.backward(clock.compute(0.0))
    assert clock() == pytest.approx(0.1 + 0.1 + 0.2)


def test_computing_for_too_long_is_counted_and_not_made_up_for() -> None:
    clock = Clock()
    padded = padding(StageTimes(0.1, 0.2), clock)
    padded.forward(clock.compute(0.15))
    padded.backward(clock.compute(0.1))
    assert clock() == pytest.approx(0.15 + 0.2)
    assert padded.take_counts() == (2, 1)
    assert padded.take_counts() == (0, 0)


def test_a_straggler_is_slow_in_the_iterations_in_the_middle() -> None:
    settings = replace(TIMED, jitter=0.0, warmup=3, iterations=10, straggler=(1, 1.5, 4))
    (case, *_), *_ = settings.groups()[0]
    times = settings.stage_times(case)
    assert times is not None
    assert [each.slow[0] for each in times] == [1.0, 1.5, 1.0, 1.0]
    clock, durations = Clock(), []
    padded = padding(times[1], clock)
    for _ in range(13):
        begin_s = clock()
        for _ in range(case.microbatches_per_update):
            padded.forward(clock.compute(0.01))
            padded.backward(clock.compute(0.01))
        durations.append(clock() - begin_s)
    assert durations == pytest.approx([1.2] * 6 + [1.8] * 4 + [1.2] * 3)


def ideal_results(settings: Settings, case: Case, slower: float = 1.0) -> list[RankResult]:
    """What ranks would measure if everything took what the simulator says, times ``slower``."""
    costs = settings.timed_costs(case.num_stages)
    assert costs is not None
    stages = settings.simulate(case, costs).stages
    return [
        RankResult(
            index,
            ends_s=[1000 + slower * mark.end_s for mark in stage.marks[1:]],
            utilization=0.1 * index,
            actions=100,
            peak_activation_bytes=1000 * (case.num_stages - index),
        )
        for index, stage in enumerate(stages)
    ]


def ideal_measured(settings: Settings, slower: tuple[float, ...] = (1.0,)) -> list[Measured]:
    (group,) = settings.groups()[0]
    return [
        Measured(case, ideal_results(settings, case), [ideal_results(settings, case, factor) for factor in slower])
        for case in group
    ]


def test_rows_of_an_ideal_machine_are_what_was_predicted() -> None:
    rows = make_rows(TIMED, ideal_measured(TIMED))
    assert [row["schedule"] for row in rows] == list(TIMED.schedules)
    for row in rows:
        assert row["predicted_speedup_error"] == pytest.approx(0, abs=1e-9)
        assert row["predicted_tokens_per_second_error"] == pytest.approx(0, abs=1e-9)
        assert row["bottleneck_utilization"] == pytest.approx(0.3)
        assert row["peak_activation_bytes"] == [4000, 3000, 2000, 1000]
    assert rows[0]["speedup_vs_flush"] == 1.0
    assert json.loads(json.dumps(rows))[0]["settings"]["num_layers"] == 8


def test_without_jitter_flush_takes_the_time_of_the_bubble_formula_and_speedups_are_their_limits() -> None:
    settings = replace(TIMED, jitter=0.0)
    flush, *others = make_rows(settings, ideal_measured(settings))
    assert flush["ms_per_iteration"] == [pytest.approx((4 + 4 - 1) * 300)]
    assert flush["tokens_per_second"] == pytest.approx(4 * 32 / ((4 + 4 - 1) * 0.3))
    for row in others:
        assert row["speedup_vs_flush"] == pytest.approx(row["limit_vs_flush"])
    assert [row["limit_vs_flush"] for row in others] == [7 / 4, 7 / (4 + 3 / 2)]


def test_rows_take_the_median_of_the_repeats() -> None:
    fast, *_ = make_rows(TIMED, ideal_measured(TIMED))
    row, *_ = make_rows(TIMED, ideal_measured(TIMED, slower=(1.0, 1.3, 1.1)))
    assert row["tokens_per_second"] == pytest.approx(fast["tokens_per_second"] / 1.1)
    assert row["spread"] == pytest.approx(0.3 / 1.1)
    assert row["repeats"] == 3 and row["predicted_tokens_per_second_error"] == pytest.approx(0.1)


def test_without_flush_there_is_no_speedup_and_without_a_timed_repeat_no_row() -> None:
    one, two, three = ideal_measured(TIMED)
    three.repeats.clear()
    assert len(make_rows(TIMED, [one, two, three])) == 2
    (row,) = make_rows(TIMED, [two])
    assert row["speedup_vs_flush"] is row["predicted_speedup"] is row["predicted_speedup_error"] is None
    assert "-" in table([row]).splitlines()[1].split()


def test_with_real_compute_the_prediction_comes_from_the_times_under_flush() -> None:
    settings = Settings(("1f1b", "paci"), (2,), (2,), REAL_MODEL)
    timed = replace(settings, stage_ms=((30, 60), (30, 60)))
    measured = ideal_measured(timed)
    for one in measured:
        for rank in one.repeats[0]:
            rank.forward_s, rank.backward_s = 0.03, 0.06
    measured[1].repeats[0][0].forward_s = 99.0  # PACI's own times do not count
    flush, paci = make_rows(settings, measured)
    assert flush["predicted_tokens_per_second"] == pytest.approx(2 * 2 * 128 / (3 * 0.09))
    assert paci["predicted_speedup"] == pytest.approx(1.5)
    assert measured_costs(measured[0].repeats) == Costs((StageCosts(0.03, 0.06),) * 2)


def test_a_row_warns_of_actions_that_took_too_long() -> None:
    measured = ideal_measured(TIMED)
    measured[1].repeats[0][0].overruns = 8
    rows = make_rows(TIMED, measured)
    assert [overrun_warning(row) is None for row in rows] == [True, False, True]
    assert rows[1]["overrun_share"] == pytest.approx(0.02) and "2.0%" in (overrun_warning(rows[1]) or "")


def test_what_is_measured_ends_before_any_stage_runs_out_of_work() -> None:
    """The last stage to start a drain's cooldown is the first; what is measured must be over when the first one stops."""
    for name in ("paci", "paci:2", "paci-v"):
        for n in (2, 4, 8):
            for a in (1, 3, 4, 16):
                settings = Settings((name,), (n,), (a,), TIMED_MODEL, stage_ms=((1, 2),), iterations=2)
                case = Case(find_arm(name), n, a)
                costs = settings.timed_costs(n)
                assert costs is not None
                total = settings.train_iters(case)
                first = case.arm.plan.simulate(a, total, costs, record=True).stages[0]
                last_forward_s = max(span.start_s for span in first.spans if span.action.kind is Kind.FORWARD)
                assert first.marks[total - case.drain_iterations].end_s <= last_forward_s, (name, n, a)


def test_cases_that_do_not_exist_are_notes() -> None:
    settings = replace(TIMED, num_stages=(2, 4), microbatches_per_update=(2, 4))
    groups, notes = settings.groups()
    assert [[str(case) for case in group] for group in groups] == [
        ["N=2 a=2 1f1b", "N=2 a=2 paci", "N=2 a=2 interleaved:2"],
        ["N=2 a=4 1f1b", "N=2 a=4 paci", "N=2 a=4 interleaved:2"],
        ["N=4 a=2 1f1b", "N=4 a=2 paci"],
        ["N=4 a=4 1f1b", "N=4 a=4 paci", "N=4 a=4 interleaved:2"],
    ]
    (note,) = notes
    assert "interleaved:2 does not exist for 2 micro-batches per update on 4 stages" in note


def test_schedules_take_turns_and_every_second_repeat_is_the_other_way_round() -> None:
    (group,), _ = TIMED.groups()
    order = [(case.arm.name, repeat) for case, repeat in main.measurements(TIMED, [group])]
    one, two, three = TIMED.schedules
    assert order == [(one, 0), (two, 0), (three, 0), (one, 1), (two, 1), (three, 1), (three, 2), (two, 2), (one, 2)]


def test_trainings_of_a_size_differ_by_their_schedule_alone() -> None:
    settings = replace(TIMED, schedules=("1f1b", "paci", "paci:2", "interleaved:2", "paci-bare"), megatron_flags=("--bf16",))
    (group,), _ = settings.groups()
    flush, paci, more, interleaved, bare = (settings.training_arguments(case, "F", train_iters=9) for case in group)
    at = flush.index("--bf16")
    for argv, flags in (
        (paci, ["--pipeline-schedule", "paci"]),
        (more, ["--pipeline-schedule", "paci", "--paci-extra-in-flight", "2"]),
        (interleaved, ["--num-virtual-stages-per-pipeline-rank", "2"]),
    ):
        assert argv == [*flush[:at], *flags, *flush[at:]]
    at = bare.index("--clip-grad")
    assert bare[at + 1] == "0.0" and [*bare[: at + 1], "1.0", *bare[at + 2 :]] == paci


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedules", "zb-h1"], "--schedules zb-h1: no schedule that can be run here; choose from 1f1b, interleaved"),
        (["--schedules", "interleaved:1"], "at least 2 chunks"),
        (["--schedules", "paci", "paci"], "name each schedule once"),
        (["--num-stages", "1"], "--num-stages 1: give at least 2"),
        (["--microbatches-per-update", "0"], "--microbatches-per-update 0: give at least 1"),
        (["--iterations", "0"], "--iterations 0: give at least 1"),
        (["--hidden-size", "0"], "--hidden-size 0: give at least 1"),
        (["--timed-stage-ms", "100"], "--timed-stage-ms 100: expected FORWARD:BACKWARD"),
        (["--timed-stage-ms", "0:2"], "--timed-stage-ms 0:2: a forward and a backward take time"),
        (["--timed-stage-ms", "1:2", "1:2", "1:2"], "--num-stages 2: --timed-stage-ms has 3 stages"),
        (["--jitter", "0.2"], "--jitter 0.2: only timed stages can be varied; add --timed-stage-ms"),
        (["--straggler", "1:1.5:2"], "--straggler 1:1.5:2: only timed stages can be slowed down; add --timed-stage-ms"),
        (["--straggler", "9:1.5:2", "--timed-stage-ms", "1:2"], "--straggler 9:1.5:2: give a stage from 0 to"),
        (["--jitter", "1", "--timed-stage-ms", "1:2"], "--jitter 1: give a share of the time"),
        (["--num-layers", "4"], "--num-layers 4: the layers and the loss, which counts as one, are dealt to 2 parts"),
        (["--num-layers", "3", "--timed-stage-ms", "1:2"], "--num-layers 3: the layers are dealt to 2 parts"),
        (["--schedules", "interleaved:2", "--microbatches-per-update", "3"], "nothing to measure: interleaved:2 does not"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    argv = ["--num-stages", "2", "--microbatches-per-update", "2", "--output", str(output), *words]
    with pytest.raises(SystemExit) as exit:
        main.main(argv)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not output.exists()


def test_stage_times_are_read() -> None:
    assert parse_stage_ms("100:200.5") == (100, 200.5)
    with pytest.raises(UsageError, match="1:2:3"):
        parse_stage_ms("1:2:3")


class _Launcher:
    """Measures ideally, until told to fail."""

    def __init__(self, settings: Settings, fails_at: int, failure: BaseException) -> None:
        self.settings, self.fails_at, self.failure = settings, fails_at, failure
        self.jobs: list[Job] = []

    def run(self, num_ranks: int, job: Job, logs: Path, timeout_s: float) -> list[RankResult]:
        if len(self.jobs) == self.fails_at:
            raise self.failure
        self.jobs.append(job)
        (case,) = (case for group in self.settings.groups()[0] for case in group if case.slug == logs.parent.name)
        return ideal_results(self.settings, case)


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (RuntimeError("rank 1 failed"), 1, "benchmark_throughput.py: error: rank 1 failed"),
        (KeyboardInterrupt(), 130, "benchmark_throughput.py: interrupted"),
    ],
)
def test_what_is_finished_is_kept(
    failure: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = Settings(("1f1b", "paci"), (2,), (2,), TIMED_MODEL, stage_ms=((1, 2),))
    launcher = _Launcher(settings, fails_at=3, failure=failure)  # two of memory, one of time
    monkeypatch.setattr(main, "_launcher", lambda settings: launcher)
    output = tmp_path / "new" / "rows.json"
    argv = ["--num-stages", "2", "--microbatches-per-update", "2", "--timed-stage-ms", "1:2", "--output", str(output)]
    assert main.main(argv) == code
    (row,) = json.loads(output.read_text())
    assert row["schedule"] == "1f1b" and row["repeats"] == 1
    assert said in capsys.readouterr().err
    assert output.with_suffix(".png").exists()
    assert [job.measures_memory for job in launcher.jobs] == [True, True, False]
    assert launcher.jobs[2].stage_times == (StageTimes(0.001, 0.002),) * 2 and launcher.jobs[0].stage_times is None


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    argv = ["--num-stages", "2", "--microbatches-per-update", "3", "--schedules", "1f1b", "interleaved:2", "--dry-run"]
    assert main.main([*argv, "--timed-stage-ms", "1:2", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "not measured: interleaved:2" in shown and "N=2 a=3 1f1b, repeat 2" in shown and "in all about" in shown
    assert not output.exists()


def test_auto_is_run_with_its_budget_and_foretold_with_what_it_chose() -> None:
    auto, bounded = Case(find_arm("paci:auto"), 8, 4), Case(find_arm("paci:auto:12"), 8, 4)
    assert auto.arm.flags() == ["--pipeline-schedule", "paci", "--paci-extra-in-flight", "auto"]
    assert bounded.arm.flags()[-2:] == ["--paci-memory-budget", "12"]
    assert (auto.drain_iterations, bounded.drain_iterations) == (5, 4), "16 and 12 micro-batches may be in flight"
    assert auto.least_warmup == 2 * 2 + 8 + 2 * 5, "it measures first"
    assert auto.as_chosen((0, 1) * 3 + (0,)).arm.plan.extra_in_flight == "0,1,0,1,0,1,0"
