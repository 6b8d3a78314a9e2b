"""The demo's parts: the corpus, the commands, what is shown, and the report from metrics files."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.gpt import demo, demo_corpus, demo_report
from lab import processes
from paci_megatron.telemetry import speed
from tests.conftest import MegatronDefaults

LOG_INTERVAL, EVAL_INTERVAL, TRAIN_ITERS = 2, 8, 16
TOKENS = 100  # an iteration's


def make_events(ms: float, boundary_ms: float, final_ppl: float, max_drift: int) -> list[dict[str, Any]]:
    """A run's metrics: ``ms`` an iteration, but ``boundary_ms`` where a log interval touches the start or a drain."""
    events: list[dict[str, Any]] = []
    train_s, begin = 0.0, 0
    for end in [1, *range(LOG_INTERVAL, TRAIN_ITERS + 1, LOG_INTERVAL)]:
        drains = end % EVAL_INTERVAL == 0
        touches = begin <= 1 or drains or begin % EVAL_INTERVAL == 0
        per_iteration = boundary_ms if touches else ms
        train_s += (end - begin) * per_iteration / 1000
        if drains:
            stages = [
                {"stage_index": s, "max_drift": max_drift if s == 0 else 0, "bubble_fraction": bubble, "wall_s": 2.0}
                for s, bubble in enumerate((0.1, 0.3))
            ]
            events.append({"event": "drain", "iteration": end, "stages": stages})
        position = {"iteration": end, "tokens": end * TOKENS, "train_s": train_s}
        loss = math.log(2000) if end == 1 else 4.0
        events.append(
            {"event": "train", **position, "iterations": end - begin, "loss": loss, "ms_per_iteration": per_iteration}
        )
        if drains:
            for factor in (0.9, 1 / 0.9) if end == TRAIN_ITERS else (1.0,):
                perplexity = final_ppl * factor
                events.append({"event": "evaluation", **position, "loss": math.log(perplexity), "perplexity": perplexity})
        begin = end
    return events


@pytest.fixture
def runs() -> dict[str, list[dict[str, Any]]]:
    """The metrics of both schedules: 300 and 210 ms an iteration in steady state."""
    return {"1f1b": make_events(300, 500, 40.0, max_drift=0), "paci": make_events(210, 900, 41.0, max_drift=1)}


def test_corpus_has_the_text_files_in_order(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    for name, content in {
        "b.py": b"b = 1\n",
        "a/z.py": "z = 'é'\n".encode(),
        "a.py": b"a = 1\n",
        "latin.py": b"x = '\xe9'\n",
        "empty.py": b" \n",
        "notes.txt": b"no source\n",
        "test/test_a.py": b"skipped\n",
        "a/site-packages/p.py": b"skipped\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    corpus = tmp_path / "data" / "corpus.jsonl"
    assert demo_corpus.write_corpus(root, corpus) == (3, 21)
    lines = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert lines == [
        {"text": "a = 1\n", "path": "a.py"},
        {"text": "z = 'é'\n", "path": "a/z.py"},
        {"text": "b = 1\n", "path": "b.py"},
    ]
    first = corpus.read_bytes()
    demo_corpus.write_corpus(root, corpus)
    assert corpus.read_bytes() == first


def test_corpus_skips_folders_below_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "test" / "lib"
    root.mkdir(parents=True)
    (root / "a.py").write_text("a = 1\n")
    assert demo_corpus.source_files(root) == [root / "a.py"]


def test_corpus_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python source files"):
        demo_corpus.write_corpus(tmp_path, tmp_path / "corpus.jsonl")


def test_standard_library_is_a_corpus() -> None:
    texts = demo_corpus.documents(demo_corpus.standard_library())
    assert sum(len(document["text"]) for document in itertools.islice(texts, 100)) > 500_000


def test_steady_intervals_lie_strictly_between_drains(runs: dict[str, list[dict[str, Any]]]) -> None:
    steady = speed.steady_intervals(runs["paci"])
    # Drains after 8 and 16; the interval from 1 to 2 follows the start.
    assert [(i.start, i.end) for i in steady] == [(2, 4), (4, 6), (10, 12), (12, 14)]
    assert speed.tokens_per_second(runs["paci"]) == pytest.approx(TOKENS / 0.210)


def test_no_steady_interval_is_an_error(runs: dict[str, list[dict[str, Any]]]) -> None:
    start = [event for event in runs["paci"] if event["iteration"] <= 2]
    with pytest.raises(ValueError, match="more iterations"):
        speed.tokens_per_second(start)


def test_summary_has_the_contracts_keys_and_values(runs: dict[str, list[dict[str, Any]]]) -> None:
    summary = demo_report.summarize(runs, num_stages=2, microbatches_per_update=2)
    assert list(summary) == ["num_stages", "microbatches_per_update", "speedup_limit", "speedup", "schedules"]
    assert summary["speedup_limit"] == 1.5
    assert summary["speedup"] == pytest.approx(300 / 210)
    assert list(summary["schedules"]) == ["1f1b", "paci"]
    paci = summary["schedules"]["paci"]
    assert paci == {
        "validation_ppl": pytest.approx(41.0),  # the two last evaluations' losses averaged
        "initial_ppl": pytest.approx(2000),
        "tokens": TRAIN_ITERS * TOKENS,
        "train_seconds": pytest.approx(8 * 0.210 + 8 * 0.900),
        "tokens_per_second": pytest.approx(TOKENS / 0.210),
        "iterations": TRAIN_ITERS,
        "max_drift": 1,
        "bubble_fraction": pytest.approx(0.2),
    }
    json.dumps(summary, allow_nan=False)


def test_runs_of_different_length_are_refused(runs: dict[str, list[dict[str, Any]]]) -> None:
    runs["paci"] = [event for event in runs["paci"] if event["iteration"] <= 12]
    with pytest.raises(ValueError, match="intervals differ"):
        demo_report.summarize(runs, 2, 2)


@pytest.mark.parametrize("missing", ["evaluation", "drain"])
def test_incomplete_metrics_are_refused(runs: dict[str, list[dict[str, Any]]], missing: str) -> None:
    events = [event for event in runs["paci"] if event["event"] != missing]
    with pytest.raises(ValueError, match="incomplete"):
        demo_report.summarize_run(events)


def test_table_shows_both_schedules_and_the_limit(runs: dict[str, list[dict[str, Any]]]) -> None:
    table = demo_report.table(demo_report.summarize(runs, 2, 2))
    for text in ("1F1B-flush", "PACI", "40.00", "41.00", "2,000", "speed-up 1.43x", "1.50x"):
        assert text in table
    assert max(map(len, table.splitlines())) <= 120


def test_curves_are_drawn(runs: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    demo_report.plot_curves(runs, demo_report.summarize(runs, 2, 2), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("num_gpus", "stages"), [(0, 2), (1, 2), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (16, 8)])
def test_stages_are_the_largest_power_of_two_of_the_gpus(num_gpus: int, stages: int) -> None:
    assert demo.pipeline_stages(num_gpus) == stages


@pytest.mark.parametrize(("num_stages", "on_gpu"), [(2, False), (2, True), (4, True), (8, True)])
def test_flags_are_megatrons_and_fit_together(num_stages: int, on_gpu: bool, megatron_defaults: MegatronDefaults) -> None:
    flags = demo.Settings(num_stages, on_gpu, demo.TRAIN_ITERS).flags()
    assert {f"--{flag}" for flag in flags} <= megatron_defaults.flags
    assert (flags["num-layers"] + 1) % num_stages == 0
    assert flags["global-batch-size"] == flags["micro-batch-size"] * num_stages
    assert flags["hidden-size"] % flags["num-attention-heads"] == 0


@pytest.mark.parametrize("train_iters", [demo.MIN_TRAIN_ITERS, 100, demo.TRAIN_ITERS])
def test_intervals_leave_a_steady_state(train_iters: int) -> None:
    settings = demo.Settings(2, False, train_iters)
    ends = [1, *range(settings.log_interval, train_iters + 1, settings.log_interval)]
    ends = sorted(set(ends))
    events: list[dict[str, Any]] = [
        {"event": "train", "iteration": end, "iterations": end - begin, "tokens": end, "ms_per_iteration": 1.0}
        for begin, end in itertools.pairwise([0, *ends])
    ]
    drains = range(settings.eval_interval, train_iters + 1, settings.eval_interval)
    events += [{"event": "drain", "iteration": drain} for drain in drains]
    steady = speed.steady_intervals(events)
    assert sum(i.end - i.start for i in steady) >= train_iters / 4
    if train_iters == demo.TRAIN_ITERS:
        assert sum(i.end - i.start for i in steady) >= 0.7 * train_iters


def test_commands_differ_by_the_schedule_alone(tmp_path: Path) -> None:
    settings = demo.Settings(2, False, demo.TRAIN_ITERS)
    flush, paci = (demo.training_command(settings, s, tmp_path / "p", tmp_path / "m.jsonl") for s in demo.SCHEDULES)
    assert paci == [*flush, "--pipeline-schedule", "paci"]


def test_paths_in_commands_are_relative_to_the_root_where_possible(tmp_path: Path) -> None:
    inside = demo.preprocess_command(demo.ROOT / "runs" / "c.jsonl", demo.ROOT / "runs" / "p")
    assert inside[2] == os.path.join("runs", "c.jsonl")
    assert demo.preprocess_command(tmp_path / "c.jsonl", tmp_path / "p")[2] == str(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (
            " [2026-01-01 00:00:00.1] iteration   10/  480 | consumed samples:  80 | elapsed time per iteration (ms): "
            "250.1 | learning rate: 1.0E-03 | global batch size: 8 | lm loss: 5.0E+00 | loss scale: 1.0 |\n",
            "iteration   10/  480 | elapsed time per iteration (ms): 250.1 | learning rate: 1.0E-03 | lm loss: 5.0E+00",
        ),
        (
            " validation loss at iteration 8 | lm loss PPL: 9.1E+02 | \n",
            "validation loss at iteration 8 | lm loss PPL: 9.1E+02 |",
        ),
        (
            "paci-megatron: drained after iteration 8 | 8 updates |\n",
            "paci-megatron: drained after iteration 8 | 8 updates |",
        ),
        ("paci-megatron: clipping: none\n", "paci-megatron: clipping: none"),
        ("INFO:megatron.core:something\n", None),
        ("---------------\n", None),
    ],
)
def test_progress_shows_what_matters(line: str, shown: str | None) -> None:
    assert demo.progress_line(line) == shown


def test_failed_step_shows_the_end_of_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "step.log"
    command = ["-c", "print('first'); print('shown'); raise SystemExit('it broke')"]
    with pytest.raises(demo.StepFailedError, match=r"(?s)it broke.*the step failed with status 1"):
        demo.run_step("the step", command, log, dict(os.environ), lambda line: line.strip() if "shown" in line else None)
    assert log.read_text().splitlines()[1:] == ["first", "shown", "it broke"]
    assert capsys.readouterr().out.splitlines()[1:] == ["  shown"]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_children(tmp_path: Path, signal_number: int) -> None:
    # A stand-in for a step that writes its process id and then works for long.
    script = f"""
import os, sys
from pathlib import Path
from examples.gpt import demo
command = ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"]
step = lambda *_: demo.run_step("step", command, Path({str(tmp_path)!r}) / "log", dict(os.environ), str.strip)
demo.run_demo, demo.choose_settings = step, lambda _: None
sys.exit(demo.main(["--output", {str(tmp_path)!r}]))
"""

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, as these tests may be, ignores them

    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=demo.ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        assert process.stdout is not None
        process.stdout.readline()
        child = int(process.stdout.readline())
        process.send_signal(signal_number)
        assert process.wait(timeout=20) == 130
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_too_few_iterations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--train-iters", str(demo.MIN_TRAIN_ITERS - 1)])
    assert exit_info.value.code == 2
    assert f"at least {demo.MIN_TRAIN_ITERS}" in capsys.readouterr().err


def test_cpu_runs_hide_a_single_gpu() -> None:
    assert processes.environment(on_gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
    inherited = processes.environment(on_gpu=True)
    assert inherited.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert inherited["OMP_NUM_THREADS"] == "1"


@pytest.mark.slow
def test_whole_demo_with_few_iterations(tmp_path: Path) -> None:
    script = demo.ROOT / "examples" / "gpt" / "demo.py"
    output = tmp_path / "demo"
    output.mkdir()
    (output / "paci.jsonl").write_text('{"event": "train", "iteration": 1}\n')  # of an earlier demo
    command = [sys.executable, str(script), "--train-iters", str(demo.MIN_TRAIN_ITERS), "--output", "demo"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert [run["iterations"] for run in summary["schedules"].values()] == [demo.MIN_TRAIN_ITERS] * 2
    assert summary["schedules"]["paci"]["max_drift"] == 1
    assert (output / "curves.png").stat().st_size > 10_000
    assert "PACI, iterations" in (output / "report.html").read_text(encoding="utf-8"), "its trace is shown"
    assert "speed-up" in finished.stdout
