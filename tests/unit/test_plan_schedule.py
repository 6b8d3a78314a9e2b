"""The planner: its text, its advice, what it reads, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.study import many_stages
from paci_megatron.cli.plan import main
from paci_megatron.schedule.schedules import even_slack, max_drift
from paci_megatron.simulate.advice import Scenario, advise, smallest_a
from paci_megatron.simulate.costs import Costs, StageCosts, parse_stage_ms
from paci_megatron.simulate.peers import find_schedule
from paci_megatron.telemetry import timelines
from paci_megatron.telemetry.stage_times import measured_stages
from paci_megatron.usage import UsageError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "plan_schedule.txt"
GOLDEN_ARGUMENTS = (
    "--num-stages 4 --microbatches-per-update 4 --stage-ms 90:180 100:200 100:200 120:240:100 --update-ms 10 --latency-ms 5 "
    "--updates 20 --activation-bytes 1e9"
)
SMALL = "--num-stages 2 --microbatches-per-update 2 --updates 5 --stage-ms 100:200"


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The tool's output; it must succeed."""
    status = main(shlex.split(arguments))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_golden_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = f".venv/bin/python tools/plan_schedule.py {GOLDEN_ARGUMENTS} > {GOLDEN.relative_to(ROOT)}"
    assert run(GOLDEN_ARGUMENTS, capsys) == GOLDEN.read_text(encoding="utf-8"), f"if this is right now: {command}"


def test_runs_as_a_script_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "plan_schedule.py"), *shlex.split(SMALL), "--schedules", "paci"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 stages, 2 micro-batches per update" in result.stdout


def test_json_has_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    out = json.loads(run("--num-stages 4 --microbatches-per-update 4 8 --stage-ms 100:200 --json", capsys))
    assert (out["num_stages"], out["smallest_a_for_drift_1"]) == (4, 3)
    assert [plan["microbatches_per_update"] for plan in out["plans"]] == [4, 8]
    assert [plan["speedup_limit"] for plan in out["plans"]] == [7 / 4, 11 / 8]
    for plan in out["plans"]:
        a = plan["microbatches_per_update"]
        by_name = {schedule["schedule"]: schedule for schedule in plan["schedules"]}
        flush, paci = by_name["1f1b"], by_name["paci"]
        assert flush["speedup_vs_flush"] == 1 and flush["bubble_fraction"] == pytest.approx([3 / (a + 3)] * 4)
        assert paci["microbatches_per_s"] == pytest.approx(100 * a / (0.3 * (100 * a + 3)))
        assert paci["peak_activations"] == [4, 3, 2, 1]
        assert paci["max_drift"] == [1, 1, 1, 0]
        assert paci["mean_drift"] == pytest.approx([3 / a, 2 / a, 1 / a, 0])
        assert by_name["pipedream"]["updates_late"] == 3 and by_name["pipedream"]["max_drift"] == [0] * 4
        assert by_name["paci:3"]["peak_activations"] == [7, 5, 3, 1]


def test_several_numbers_of_microbatches_give_several_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(f"{SMALL} --microbatches-per-update 2 3", capsys)
    assert out.count("1F1B-flush  ") == 2
    assert out.count("interleaved") == 1, "with 3 micro-batches on 2 stages there is none"


@pytest.mark.parametrize(("n", "drift", "extra"), [(1, 1, 0), (2, 1, 0), (8, 1, 0), (8, 2, 0), (8, 1, 1), (9, 3, 0)])
def test_smallest_a(n: int, drift: int, extra: int) -> None:
    a = smallest_a(n, drift, extra)
    slack = even_slack(n, extra)
    assert max_drift(0, n, a, slack) <= drift
    assert a == 1 or max_drift(0, n, a - 1, slack) > drift


def advice(n: int, a: int, updates: int = 50, **costs: Any) -> list[str]:
    """The planner's sentences for equal stages of 100:200 ms, unless ``stages`` are given, against all other schedules."""
    stages = costs.pop("stages", (StageCosts(0.1, 0.2),) * n)
    scenario = Scenario(a, updates, Costs(stages, **costs))
    others = [find_schedule(name) for name in ("1f1b", "interleaved:2", "zb-h1")]
    return advise(scenario, [scenario.outcome(other) for other in others if other.problem(n, a) is None])


def test_advice_where_paci_helps() -> None:
    verdict, smallest, extra, slack, _ = advice(8, 8, updates=100)
    assert verdict == "PACI helps: 1.86x the throughput of 1F1B-flush, where the bubble allows 1.88x."
    assert smallest == "Drift stays within 1 update from 7 micro-batches per update on, where the bubble allows 2.00x."
    assert "buys nothing here, for 9 activations instead of 8 and a drift of up to 1 instead of 1." in extra
    assert "buys nothing here, for 15 activations instead of 8 and a drift of up to 2 instead of 1." in slack


@pytest.mark.parametrize(
    ("verdict", "case"),
    [
        ("with one stage there is no bubble", {"n": 1, "a": 8}),
        ("the bubble of 1F1B-flush is only 1.5%", {"n": 2, "a": 64}),
        ("is still bubble, so drain less often", {"n": 8, "a": 8, "updates": 1}),
        ("ZB-H1 reaches 97% of its speed without drift, holding 8 activations instead of 8", {"n": 8, "a": 64}),
        (
            "the links set the pace, a message occupies one for 500 ms and a stage computes for 300 ms",
            {"n": 8, "a": 8, "message_bytes": 5e8, "bandwidth_bytes_per_s": 1e9},
        ),
        (
            "balanced stages would gain more than PACI does, so balance them first",
            {"n": 4, "a": 16, "stages": (StageCosts(0.1, 0.2),) * 3 + (StageCosts(0.2, 0.4),)},
        ),
    ],
)
def test_advice_where_paci_does_not_help(verdict: str, case: dict[str, Any]) -> None:
    first = advice(**case)[0]
    assert first.startswith("PACI will not help") and verdict in first


def test_advice_says_what_drift_has_cost_where_it_was_measured() -> None:
    for a, said in ((8, "up to 1 update cost 0.7%"), (4, "up to 2 updates cost 1.3%"), (2, "up to 2 updates cost 1.3%")):
        cost = advice(8, a)[-1]
        assert said in cost
        assert ("A drift of up to 4 costs more." in cost) == (a == 2)


def test_advice_about_transfers_and_balance() -> None:
    slack = advice(4, 4, latency_s=0.03)[3]
    assert slack.startswith("One more for each stage that follows (paci:3) buys 1")
    stages = (StageCosts(0.1, 0.2), StageCosts(0.1, 0.2), StageCosts(0.2, 0.4), StageCosts(0.1, 0.2))
    balance = advice(4, 4, updates=200, stages=stages)[4]
    assert balance.startswith("Stage 2 is the slowest: 600 ms a micro-batch, 375 ms on average.")
    gain = re.search(r"would make PACI ([\d.]+)% faster", balance)
    assert gain and float(gain[1]) == pytest.approx((600 / 375 - 1) * 100, rel=0.01), "without a bubble all of it is lost"


@pytest.mark.parametrize("ending", timelines.ENDINGS)
def test_timelines(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / f"schedules{ending}"
    run(f"{SMALL} --schedules 1f1b paci --timeline {path} --timeline-updates 2", capsys)
    content = path.read_bytes()
    if ending == ".png":
        assert content.startswith(b"\x89PNG")
        return
    assert b"1F1B-flush" in content and b"PACI" in content
    assert b"F3" in content and b"F4" not in content, "two updates of two micro-batches"


def metrics(path: Path, drains: list[list[dict[str, Any]]]) -> Path:
    events = [{"event": "train", "iteration": 1}] + [{"event": "drain", "stages": stages} for stages in drains]
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def report(stage: int, updates: int, wall_s: float, bubble: float) -> dict[str, Any]:
    return {"stage_index": stage, "updates": updates, "wall_s": wall_s, "bubble_fraction": bubble}


def test_stage_times_from_a_runs_meters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow_start = [report(0, 5, 100.0, 0.9), report(1, 5, 100.0, 0.9)]
    # 10 and 20 updates of 4 micro-batches: 0.4 s and 0.8 s of compute a micro-batch, and 0.2 s an update.
    steady = [[report(s, u, u * 4.0, 1 - (0.2 + 4 * t) / 4.0) for s, t in ((0, 0.4), (1, 0.8))] for u in (10, 20)]
    path = metrics(tmp_path / "run.jsonl", [slow_start, *steady])
    first, second = measured_stages(path, microbatches_per_update=4, update_ms=200)
    assert (first.forward_s, first.backward_s) == pytest.approx((0.4 / 3, 0.8 / 3))
    assert (second.forward_s, second.backward_s) == pytest.approx((0.8 / 3, 1.6 / 3))
    only = metrics(tmp_path / "only.jsonl", [slow_start])
    assert measured_stages(only, 4, 0)[0].backward_s == pytest.approx(100 * 0.1 / 5 / 4 * 2 / 3)
    out = run(f"--metrics {path} --microbatches-per-update 8 --run-microbatches-per-update 4 --update-ms 200", capsys)
    assert "2 stages, 8 micro-batches per update" in out and "133.3:266.7:133.3 266.7:533.3:266.7" in out
    header = {"event": "run", "iteration": 0, "microbatches_per_update": 4}
    path.write_text(f"{json.dumps(header)}\n{path.read_text()}")
    assert run(f"--metrics {path} --microbatches-per-update 8 --update-ms 200", capsys) == out, "the file says it"


def test_stage_times_in_text() -> None:
    assert parse_stage_ms("100:200", 5) == StageCosts(0.1, 0.2, 0.1, 0.005)
    assert parse_stage_ms("1.5:2:0.5", 0) == StageCosts(0.0015, 0.002, 0.0005, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stage-ms 1:2", "--microbatches-per-update is missing; give one or several"),
        ("--microbatches-per-update 0 --stage-ms 1:2", "--microbatches-per-update 0: give at least 1"),
        ("--microbatches-per-update 4", "--stage-ms, --metrics and --trace: give exactly one"),
        ("--microbatches-per-update 4 --stage-ms 1", "--stage-ms 1: expected FORWARD:BACKWARD or FORWARD:BACKWARD:WEIGHT"),
        ("--microbatches-per-update 4 --stage-ms 1:2:3:4", "--stage-ms 1:2:3:4: expected FORWARD:BACKWARD"),
        ("--microbatches-per-update 4 --stage-ms 0:2", "--stage-ms 0:2: a forward and a backward take time; give"),
        ("--microbatches-per-update 4 --stage-ms 1:2:3", "--stage-ms 1:2:3: WEIGHT is a part of BACKWARD; give 0 to 2"),
        (
            "--microbatches-per-update 4 --stage-ms 1:2 1:2 --num-stages 3",
            "--num-stages 3: --stage-ms has 2 stages; give the",
        ),
        ("--microbatches-per-update 4 --stage-ms 1:2 --num-stages 0", "--num-stages 0: give at least 1"),
        (f"{SMALL} --updates 0", "--updates 0: give at least 1"),
        (f"{SMALL} --jitter 1", "--jitter 1: give a share of the time, from 0 to below 1"),
        (f"{SMALL} --latency-ms -1", "--latency-ms -1: give a number of at least 0"),
        (f"{SMALL} --bandwidth-gb-per-s 0", "--bandwidth-gb-per-s 0.0: give more than 0, or leave it out"),
        (f"{SMALL} --schedules gpipe", "'gpipe' is no schedule: choose from 1f1b"),
        (
            f"{SMALL} --microbatches-per-update 3 --schedules interleaved:2",
            "interleaved:2 does not exist for 3 micro-batches",
        ),
        (f"{SMALL} --timeline plan.svg", "--timeline plan.svg: .svg; choose .txt, .csv, .json, .html, .png"),
        (
            f"{SMALL} --microbatches-per-update 2 4 --timeline plan.txt",
            "--timeline draws one number of micro-batches; give one",
        ),
        ("--microbatches-per-update 4 --metrics no/such.jsonl", "no/such.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_metrics_that_do_not_say_enough_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no drain event; stage times are written at drains, so let the run reach one"):
        measured_stages(metrics(tmp_path / "none.jsonl", []), 4, 0)
    with pytest.raises(UsageError, match=r"--update-ms 600: stage 0 of .* computes 500 ms in all; give less"):
        measured_stages(metrics(tmp_path / "short.jsonl", [[report(0, 2, 2.0, 0.5)]]), 4, 600)
    of_a_v = metrics(tmp_path / "v.jsonl", [[report(0, 2, 2.0, 0.5)]])
    of_a_v.write_text('{"event": "run", "schedule": "paci-v", "emulated": false}\n' + of_a_v.read_text())
    with pytest.raises(UsageError, match="of paci-v, where two stages share a process's time"):
        measured_stages(of_a_v, 4, 0)
    with pytest.raises(UsageError, match="no update between drains on stage 0"):
        measured_stages(metrics(tmp_path / "empty.jsonl", [[report(0, 0, 2.0, 0.5)]]), 4, 0)


def test_study_prints_a_row_a_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_stages, "MEASURED_MICROBATCHES", 64)
    assert many_stages.main(["--study", "4", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][:4] == ["N", "jitter", "latency", "1F1B-flush"] and len(rows) == 2 + 2 * len(many_stages.SETTINGS)
    four, eight = rows[2], rows[6]
    by_title = dict(zip(rows[0], eight, strict=True))
    assert by_title | {"N": "8", "1F1B-flush": "53.3%", "PACI": "100.0%", "PACI / 1F1B-flush": "1.88"} == by_title
    assert four[0] == "4" and four[3] == "57.1%"
    assert many_stages.main(["--study", "1"]) == 2
    assert "--study 1: give at least 2 stages" in capsys.readouterr().err
