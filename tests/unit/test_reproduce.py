"""The study's parts: its sets, resuming, statistics and speed-ups on curves whose answers are known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from lab.study import statistics as st
from lab.study import timing
from lab.study.analysis import Analysis, RunResult
from lab.study.arms import SETS, Arm, Study, StudyError
from lab.study.commands import Data, training_command
from lab.study.records import RunFolder
from lab.study.report import markdown
from tests.conftest import MegatronDefaults

DATA = Data("train", "valid", ("--tokenizer-type", "NullTokenizer"), 64)


def flags_of(command: list[str]) -> dict[str, str]:
    return {word: following for word, following in zip(command, [*command[1:], ""], strict=True) if word.startswith("--")}


def write_events(path: Path, events: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


def set_checkpoint(folder: Path, iteration: int) -> None:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def test_the_small_set_is_the_issues() -> None:
    study = SETS["small"]()
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    for batch in (16, 32):
        for a in (4, 8, 16):
            assert {f"flush-b{batch}-a{a}", f"paci-b{batch}-a{a}"} <= set(names)
    extras = (
        *("paci-b16-a1", "paci-b16-a1-clip", "paci-b16-a2", "paci-b16-a2-clip", "paci-b16-a4-recompute"),
        *("paci-b16-a8-stash", "paci-b16-a8-double-buffer"),
        *("flush-b32-a4-lr2", "paci-b32-a4-lr2", "paci-b32-a8-lr2", "paci-b32-a16-lr2", "paci-b32-a4-lr2-start25"),
    )
    assert set(extras) <= {arm.name for arm in study.arms if arm.is_extra}
    assert study.num_stages == 8 and study.seeds == (1, 2, 3) and study.is_emulated
    assert max(arm.max_drift(8) for arm in study.arms) == 7


def test_the_main_arms_of_the_first_seed_come_first_and_each_run_once() -> None:
    study = SETS["small"]()
    runs = list(study.runs())
    main = [arm for arm in study.arms if not arm.is_extra]
    assert runs[: len(main)] == [(arm, 1) for arm in main]
    assert len(set(runs)) == len(runs)
    flush_seeds = {arm.name: sum(other is arm for other, _ in runs) for arm in main if arm.is_flush}
    assert flush_seeds == {f"flush-b{b}-a{a}": 3 if a == 4 else 1 for b in (16, 32) for a in (4, 8, 16)}


@pytest.mark.parametrize("name", SETS)
def test_all_arms_evaluate_and_drain_at_the_same_tokens(name: str) -> None:
    study = SETS[name]()
    for flag, per_training in (("--eval-interval", study.num_periods), ("--save-interval", study.num_periods)):
        for arm in study.arms:
            flags = flags_of(training_command(study, arm, 1, DATA, Path("run")))
            assert int(flags[flag]) * per_training == int(flags["--train-iters"]) == study.train_iters(arm)
            assert int(flags["--train-iters"]) * arm.batch_size * study.seq_length == study.tokens
            assert int(flags[flag]) % int(flags["--log-interval"]) == 0


OURS = ("emulate-stages", "weight-policy", "start-iteration", "look-ahead")


@pytest.mark.parametrize("name", SETS)
def test_every_command_parses_in_the_installed_megatron(name: str, megatron_defaults: MegatronDefaults) -> None:
    ours = {"--pipeline-schedule", *(f"--paci-{name}" for name in OURS)}
    launcher = {"--standalone", "--nproc-per-node"}
    study = SETS[name]()
    for arm in study.arms:
        used = {word for word in training_command(study, arm, 1, DATA, Path("run")) if word.startswith("--")}
        assert used - megatron_defaults.flags <= ours | launcher


def test_the_papers_setting() -> None:
    study = SETS["gpt2-medium"]()
    arm = next(arm for arm in study.arms if arm.name == "paci-b128-a8")
    command = training_command(study, arm, 1, DATA, Path("run"))
    flags = flags_of(command)
    assert flags["--train-iters"] == "380000" and flags["--micro-batch-size"] == "16"
    assert float(flags["--lr"]) == pytest.approx(3e-4 / math.sqrt(2), rel=1e-5)
    assert flags["--clip-grad"] == "0.0" and flags["--nproc-per-node"] == "8"
    flush = training_command(study, dataclasses.replace(arm, schedule="1f1b"), 1, DATA, Path("run"))
    assert command == [*flush, "--pipeline-schedule", "paci"], "flush and PACI differ by one flag"


def test_sizes_that_do_not_divide_are_refused() -> None:
    study = SETS["small"]()
    with pytest.raises(StudyError, match=r"1000 tokens.*a multiple of 40960"):
        dataclasses.replace(study, tokens=1000)
    with pytest.raises(StudyError, match=r"paci-b16-a3: a batch of 16 sequences"):
        dataclasses.replace(study, arms=(Arm("paci", 3, 16),))


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(["train.py", "--lr", "0.1", "--seed", "1"])
    folder.claim(["train.py", "--lr", "0.1", "--seed", "1"])
    with pytest.raises(StudyError, match=r"--lr 0\.1 is now --lr 0\.2.*another --output, or remove"):
        folder.claim(["train.py", "--lr", "0.2", "--seed", "1"])
    with pytest.raises(StudyError, match="added: --bf16"):
        folder.claim(["train.py", "--lr", "0.1", "--seed", "1", "--bf16"])


def test_a_resumed_run_counts_each_iteration_once_and_its_clock_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = folder.begin_attempt()
    write_events(first, [{"event": "train", "iteration": i, "train_s": float(i), "loss": 0.0} for i in (1, 2, 3, 4, 5)])
    set_checkpoint(tmp_path, 4)
    second = folder.begin_attempt()
    assert second != first
    write_events(second, [{"event": "train", "iteration": i, "train_s": i - 4.0, "loss": 1.0} for i in (5, 6)])
    assert [(e["iteration"], e["train_s"], e["loss"]) for e in folder.events()] == [
        *((i, float(i), 0.0) for i in (1, 2, 3, 4)),
        *((i, float(i), 1.0) for i in (5, 6)),
    ]
    # Killed again before another checkpoint: that attempt is made again, and the first's part stays.
    assert folder.begin_attempt() == second and not second.exists()
    assert [e["iteration"] for e in folder.events()] == [1, 2, 3, 4, 5]


def test_only_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    for iteration in (4, 8, 12):
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    set_checkpoint(tmp_path, 8)  # 12 is being written
    RunFolder(tmp_path).drop_old_checkpoints()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("iter_*")) == ["iter_0000008", "iter_0000012"]


def test_spreads() -> None:
    assert st.spread([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert st.spread([5.0]) == (5.0, None, 1)
    assert st.spread_over_runs([[1.0, 10.0], [3.0, 10.0]]) == pytest.approx(math.sqrt(2) / 2)
    assert st.spread_over_runs([[1.0, 2.0]]) is None


def test_the_mean_curve_keeps_the_tokens_that_all_have() -> None:
    one = [st.Point(10, 1.0, 4.0), st.Point(20, 2.0, 3.0)]
    two = [st.Point(20, 4.0, 2.0), st.Point(30, 6.0, 1.0)]
    assert st.mean_curve([one, two]) == [st.Point(20, 3.0, 2.5)]


def test_time_to_a_perplexity_is_interpolated_in_the_loss() -> None:
    curve = [st.Point(k, 10.0 * k, loss) for k, loss in enumerate((6.0, 4.0, 3.0, 3.5))]
    assert st.time_to(curve, math.exp(5.0)) == pytest.approx(5.0)
    assert st.time_to(curve, math.exp(3.25)) == pytest.approx(17.5)
    assert st.time_to(curve, math.exp(3.0)) == pytest.approx(20.0)
    assert st.time_to(curve, math.exp(2.9)) is None
    assert st.time_to(curve, math.exp(7.0)) == 0.0


def test_thresholds_fall_and_are_reachable() -> None:
    losses = [6.0, 5.0, 4.5, 4.2, 4.1, 4.0]
    values = st.thresholds(losses, reachable=4.05)
    assert len(values) == 4 and values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(math.exp(4.5), rel=0.01) and values[0] >= math.exp(4.5)
    assert math.exp(4.05) <= values[-1] < math.exp(4.05) * 1.01
    assert st.thresholds([5.0, 5.0, 5.0], reachable=5.0) == [149.0]


@pytest.mark.parametrize("a", [4, 8, 16])
def test_computed_times_follow_the_bubble_model(a: int) -> None:
    num_stages, seconds, updates = 8, 0.3, 40
    stage_seconds = [seconds] * num_stages
    flush, paci = Arm("1f1b", a, 16), Arm("paci", a, 16)
    flush_s = timing.period_seconds(flush, updates, stage_seconds)
    paci_s = timing.period_seconds(paci, updates, stage_seconds)
    assert flush_s == pytest.approx(updates * (a + num_stages - 1) * seconds)
    assert paci_s == pytest.approx((updates * a + num_stages - 1) * seconds)
    speeds = [timing.tokens_per_second(arm, 128, stage_seconds) for arm in (flush, paci)]
    assert speeds[1] / speeds[0] == pytest.approx((a + num_stages - 1) / a)
    assert speeds[1] == pytest.approx(16 * 128 / (a * seconds))


def test_stage_times_are_medians_between_drains() -> None:
    def drain(*stages: tuple[float, float]) -> dict[str, Any]:
        reports = [
            {"stage_index": s, "updates": 5, "wall_s": wall, "bubble_fraction": bubble}
            for s, (wall, bubble) in enumerate(stages)
        ]
        return {"event": "drain", "stages": reports}

    events = [drain((20.0, 0.5), (20.0, 0.0)), drain((30.0, 0.0), (20.0, 0.0)), drain((10.0, 0.0), (90.0, 0.0))]
    assert timing.seconds_per_microbatch([(Arm("paci", 2, 4), events)]) == [1.0, 2.0]
    assert timing.seconds_per_microbatch([]) is None


def study_of(arms: tuple[Arm, ...], seeds: tuple[int, ...]) -> Study:
    """A study of 4 stages and 4 evaluations, one every 10 updates of 4 sequences of 8 tokens."""
    return dataclasses.replace(
        SETS["smoke"](),
        num_stages=4,
        arms=arms,
        seeds=seeds,
        seq_length=8,
        tokens=40 * 4 * 8,
        num_periods=4,
        logs_per_period=2,
    )


def events_of(study: Study, arm: Arm, losses: list[float], stage_s: float, drift: int) -> list[dict[str, Any]]:
    """A run that evaluates to ``losses``, whose stages take ``stage_s`` for a micro-batch."""
    events: list[dict[str, Any]] = []
    period = study.train_iters(arm) // study.num_periods
    for index, loss in enumerate(losses, start=1):
        at = {"iteration": index * period, "tokens": study.tokens * index // len(losses), "train_s": 7.0 * index}
        stage = {"updates": period, "max_drift": drift, "bubble_fraction": 0.0, "copied_weight_bytes": 0}
        wall_s = stage_s * period * arm.microbatches_per_update
        stages = [{**stage, "stage_index": s, "wall_s": wall_s} for s in range(study.num_stages)]
        events += [{"event": "train", **at, "loss": loss}] * study.logs_per_period
        events += [{"event": "drain", "iteration": at["iteration"], "stages": stages}]
        events += [{"event": "evaluation", **at, "prefix": "validation set", "loss": loss}]
    return [*events, {"event": "evaluation", **at, "prefix": "test set", "loss": losses[-1] - 0.5}]


@pytest.fixture
def analysis() -> Analysis:
    """Flush with two seeds and PACI with one more, all with the same loss by tokens, PACI 1 % worse at the end."""
    flush, paci = Arm("1f1b", 2, 4), Arm("paci", 2, 4)
    study = study_of((flush, paci), (1, 2, 3))
    results = []
    for arm, seeds, final in ((flush, (1, 2), 3.0), (paci, (1, 2, 3), 3.0 + math.log(1.01))):
        for seed in seeds:
            losses = [6.0 + 0.1 * seed, 5.0, 4.0, final]
            results.append(RunResult(arm, seed, events_of(study, arm, losses, 0.1, 0 if arm.is_flush else 2)))
    return Analysis(study, results)


def test_the_report_of_known_runs(analysis: Analysis) -> None:
    report = analysis.as_dict()
    flush, paci = report["arms"]
    assert (report["finished_runs"], report["planned_runs"], report["times_are"]) == (5, 6, "computed")
    assert flush["validation_loss"] == {"mean": 2.5, "std": 0.0, "number": 2}
    assert flush["against_flush"] is None and paci["against_flush"]["perplexity_change"]["mean"] == pytest.approx(0.01)
    assert paci["against_flush"]["perplexity_change"]["number"] == 2, "seeds that both have"
    assert (paci["max_drift"], paci["max_drift_bound"], paci["stage_mean_drift"]) == (2, 2, 0.75)
    assert paci["training_loss"]["mean"] == pytest.approx(3.0 + math.log(1.01))


def test_computed_speedups_of_equal_curves_are_those_of_the_schedules(analysis: Analysis) -> None:
    # 10 updates of 2 micro-batches over 4 stages of 0.1 s: (2+3) a update under flush, 20+3 in all under PACI.
    rows = [row for row in analysis.threshold_rows() if row["perplexity"] > 1.1 * math.exp(3.1)]
    assert rows
    for row in rows:
        assert row["speedup"] == pytest.approx(5.0 / 2.3, rel=1e-3), "PACI's third seed moves its mean at the first point"
        assert row["speedup_over_best_flush"] == row["speedup"]
    assert analysis.curve(analysis.arms[1])[-1].seconds == pytest.approx(4 * 2.3)
    (throughput,) = analysis.throughput_rows()
    assert throughput["speedup"] == pytest.approx(2.5) == throughput["limit"]
    assert (throughput["flush_held_sequences"], throughput["paci_held_sequences"]) == (4, 8)


def test_each_schedule_is_reported_at_its_own_best_rate() -> None:
    arms = [Arm(schedule, 2, 4, lr_factor=factor) for schedule in ("1f1b", "paci") for factor in (1.0, 2.0, 4.0)]
    muon = [dataclasses.replace(arm, optimizer="muon") for arm in arms if arm.lr_factor == 1]
    bf16 = [dataclasses.replace(arm, bf16=True) for arm in arms if arm.lr_factor == 1]
    ahead = dataclasses.replace(bf16[1], look_ahead=True)
    final = dict(zip([*arms, *muon, *bf16, ahead], [3.1, 3.0, 3.2, 3.3, 3.4, 3.5, 2.0, 2.1, 2.2, 2.3, 2.25], strict=True))
    study = study_of(tuple(final), (1, 2))
    results = [
        RunResult(arm, seed, events_of(study, arm, [6.0, 5.0, 4.0, loss], 0.1, 0 if arm.is_flush else 2))
        for arm, loss in final.items()
        for seed in ((1, 2) if arm.lr_factor == 2 else (1,))
    ]
    for result in results:
        for event in result.events:
            if event["event"] == "drain":
                for stage in event["stages"]:
                    stage["mean_weight_change"] = 0.01 * (3 - stage["stage_index"]) * (not result.arm.is_flush)
    analysis = Analysis(study, results)
    flush, paci = analysis.as_dict()["best"]  # the others have one rate only
    assert (flush["best_lr_factor"], flush["is_at_the_edge"], flush["seeds"]) == (2.0, False, [1, 2])
    assert (paci["best_lr_factor"], paci["is_at_the_edge"], paci["weight_change"]) == (1.0, True, pytest.approx(0.03))
    assert list(paci["perplexity_by_lr_factor"]) == [1.0, 2.0, 4.0]
    assert flush["against_best_flush"] is None
    assert paci["against_best_flush"]["perplexity_change"]["mean"] == pytest.approx(math.expm1(0.3))
    # PACI is at exp(3.3) at the end, 4 * 2.3 s; flush, 5 s a period, after 0.7 of its last.
    assert paci["speedup"] == pytest.approx(3.7 * 5.0 / (4 * 2.3), rel=5e-3)
    against = {row["arm"]: row["against_flush"]["flush_arm"] for row in analysis.arm_rows() if row["against_flush"]}
    assert against["paci-b4-a2-muon"] == "flush-b4-a2-muon", "an optimizer is held against itself"
    assert against["paci-b4-a2-bf16"] == against["paci-b4-a2-bf16-ahead"] == "flush-b4-a2-bf16", "a precision too"
    assert "| paci-b4-a2 |" in markdown(analysis.as_dict(), [])


def test_measured_times_are_the_runs_own(analysis: Analysis) -> None:
    analysis.study = dataclasses.replace(analysis.study, is_emulated=False)
    assert [point.seconds for point in analysis.curve(analysis.arms[1])] == [7.0, 14.0, 21.0, 28.0]
    assert analysis.as_dict()["times_are"] == "measured"


def test_every_time_says_how_it_came_about(analysis: Analysis) -> None:
    text = markdown(analysis.as_dict(), [])
    timed = [line for line in text.splitlines() if line.startswith("|") and ("tokens/s" in line or ", s (" in line)]
    assert len(timed) == 2 and all("(computed)" in line and "(measured)" not in line for line in timed)
