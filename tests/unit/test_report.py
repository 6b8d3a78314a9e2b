"""The run report's content: what is on the page is what is in the metrics; what is missing is said."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.cli import main as cli
from paci_megatron.cli.report import main
from paci_megatron.schedule.schedules import flush_bubble_fraction, max_drift, speedup_limit
from paci_megatron.telemetry.run_events import read_run_events
from paci_megatron.telemetry.run_report import measures, timeline
from paci_megatron.telemetry.run_report.runs import ReportedRun, read_runs
from tests.support import report_runs as made


def page_of(folder: Path, *runs: object) -> str:
    """The page about these runs, without plotly.js."""
    output = folder / "report.html"
    assert main([*map(str, runs), "--output", str(output)]) == 0
    return re.sub(r"<script>/\*.*?</script>", "", output.read_text(encoding="utf-8"), flags=re.DOTALL)


def data_of(page: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, dict[str, list[dict[str, Any]]]] = json.loads(found[1])
    return data


def traces(page: str, name: str, number: int = 0, variant: str | None = None) -> dict[str, dict[str, Any]]:
    """The traces of a plot by their names."""
    variants = data_of(page)[name]
    return {trace["name"]: trace for trace in variants[variant or next(iter(variants))][number]["data"]}


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2].partition("<script")[0]))


@pytest.fixture
def both(tmp_path: Path) -> str:
    """The page about a run of each schedule."""
    made.write_runs(tmp_path / "runs")
    return page_of(tmp_path, tmp_path / "runs")


def test_curves_are_the_metrics_exactly(both: str) -> None:
    at = list(range(made.EVAL, made.ITERATIONS + 1, made.EVAL))
    for name, schedule in (("1F1B-flush", "1f1b"), ("PACI", "paci")):
        by_time, by_tokens = (traces(both, "losses", number)[name] for number in (0, 1))
        assert by_time["y"] == by_tokens["y"] == [math.exp(made.loss_of(i, schedule) + 0.1) for i in at]
        assert by_tokens["x"] == [i * made.TOKENS for i in at]
        assert by_time["x"] == [i * made.SECONDS[schedule] for i in at], "in seconds, which is short enough"
        logged = list(range(made.LOG, made.ITERATIONS + 1, made.LOG))
        losses = traces(both, "losses", 1, "Training loss")[name]
        assert losses["y"] == [made.loss_of(i, schedule) for i in logged]
        norms = traces(both, "clipping")[name]
        assert (norms["x"], norms["y"]) == ([i - 2 for i in logged], [4 / i for i in logged])


def test_stage_figures_are_the_metrics_and_the_bounds_the_schedules(both: str) -> None:
    n, a = made.N, made.A
    largest, mean, memory = traces(both, "drift"), traces(both, "drift", 1), traces(both, "memory")
    assert largest.keys() == mean.keys() == {"PACI", "bound"}
    assert largest["PACI"]["y"] == largest["bound"]["y"] == [max_drift(stage, n, a) for stage in range(n)]
    assert mean["PACI"]["y"] == mean["bound"]["y"] == [(n - 1 - stage) / a for stage in range(n)]
    assert memory["PACI"]["y"] == [4.0 * (n - stage) for stage in range(n)], "MiB"
    bubble = traces(both, "bubble")
    assert bubble["PACI"]["y"] == pytest.approx([0.08 + stage / 100 for stage in range(n)])
    clipped = sum(4 / i > 1 for i in range(made.LOG, made.ITERATIONS + 1, made.LOG))
    assert f"PACI --clip-grad 1.0, global {clipped} of 12 1 on stage 1 none" in text_of(both)


def test_headline_is_what_the_metrics_say(both: str) -> None:
    text = text_of(both)
    limit = speedup_limit(made.N, made.A)
    speedup = made.SECONDS["1f1b"] / made.SECONDS["paci"]
    assert f"Speed-up {speedup:.2f}× over 1F1B-flush; the bubble alone is worth {limit:.2f}×" in text
    flush = flush_bubble_fraction(made.N, made.A)
    promised = (made.N - 1) / (made.A * made.EVAL + made.N - 1)
    assert f"promised by the order alone: {flush:.1%} 1F1B-flush, {promised:.1%} PACI" in text
    assert "46.4% 1F1B-flush 9.5% PACI" in text, "the mean over stages and time"
    assert "Largest drift 1 update, PACI bound: 1" in text
    final = [math.exp(made.loss_of(made.ITERATIONS, schedule) + 0.1) for schedule in ("1f1b", "paci")]
    assert f"Final perplexity {final[0]:.2f} 1F1B-flush {final[1]:.2f} PACI on validation data, after 48 iterations" in text


def test_interleaved_chunks_are_less_bubble(tmp_path: Path) -> None:
    flush = made.write_events(tmp_path / "flush.jsonl", made.training("1f1b", chunks_per_stage=2))
    paci = made.write_events(tmp_path / "paci.jsonl", made.training("paci"))
    text = text_of(page_of(tmp_path, flush, paci))
    assert f"{(made.N - 1) / (2 * made.A + made.N - 1):.1%} 1F1B-flush" in text
    assert f"the bubble alone is worth {(2 * made.A + made.N - 1) / (2 * made.A):.2f}×" in text


def test_the_schedule_is_drawn_as_it_was_traced(both: str, tmp_path: Path) -> None:
    (drawn,) = data_of(both)["timeline"]["Timeline"]
    (run,) = read_runs([(None, tmp_path / "runs" / "paci.jsonl")])
    assert run.trace is not None
    first, last = run.trace.middle(timeline.MOST_ITERATIONS)
    for name, stages in (
        ("y3", run.trace.stretch.spans(first, last)),
        ("y4", run.trace.simulated_spans(timeline.Costs(run.trace.costs), first, last)),
    ):
        bars = [t for t in drawn["data"] if t["yaxis"] == name and t["name"] == "backward"]
        expected = [
            (stage, round(span.start_s * 1000, 5), str(span.action.index))
            for stage, spans in enumerate(stages)
            for span in spans
            if str(span.action).startswith("B")
        ]
        assert [shown for bar in bars for shown in zip(bar["y"], bar["base"], bar["text"], strict=True)] == expected
    about = [text for t in drawn["data"] if t["yaxis"] == "y3" and t["name"] == "backward" for text in t["customdata"]]
    # In the steady state a stage s > 0 has its drift in the last (N-1-s) of the a micro-batches' backwards.
    drifts = [int(text.partition("drift ")[2][0]) for text in about if " on stage 0:" in text]
    assert sum(drifts) == (last - first + 1) * (made.N - 1) and max(drifts) == 1
    assert all("weight version" in text and "; waited " in text and " of micro-batch " in text for text in about)
    flush = [text for t in drawn["data"] if t["yaxis"] == "y" for text in t["customdata"]]
    assert all("; a gap of " in text for text in flush) and not any("waited" in text for text in flush)
    assert f"PACI, iterations {first} to {last} of {made.ITERATIONS}" in text_of(both)


def test_resumed_runs_are_joined_in_every_figure(tmp_path: Path) -> None:
    """Killed after 30 iterations, resumed from 20, and once more from the end of that."""
    killed = [event for event in made.training("paci", 0, 32) if event["iteration"] <= 30]
    resumed, again = made.training("paci", 20, 40), made.training("paci", 40)
    path = made.write_events(tmp_path / "run.jsonl", [*killed, *resumed, made.header("paci", 40), *again])
    events = read_run_events(path)
    assert [e["iteration"] for e in events if e["event"] == "train"] == list(range(4, 49, 4)), "each once"
    assert [e["iteration"] for e in events if e["event"] == "drain"] == [16, 32, 40, 48]
    assert [e["iteration"] for e in events if e["event"] == "run"] == [0, 20, 40]
    train_s = [e["train_s"] for e in events if e["event"] == "train"]
    assert train_s == pytest.approx([at * made.SECONDS["paci"] for at in range(4, 49, 4)])
    page = page_of(tmp_path, path)
    assert traces(page, "losses", 1)["PACI"]["x"] == [at * made.TOKENS for at in (16, 32, 48)]
    assert "resumed after iteration 20, 40" in text_of(page) and "resumed 2 times" in text_of(page)


def test_a_file_of_an_earlier_version_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    events = [event for event in made.training("paci") if event["event"] != "run"]
    text = text_of(page_of(tmp_path, made.write_events(tmp_path / "run.jsonl", events)))
    assert "its metrics file does not say how many micro-batches make an update" in text
    assert "One run: give a second one" in text and "it was not traced (--paci-trace-dir)" in text
    assert "not said in its metrics file, which an earlier version has written" in text


def test_what_is_missing_is_said_and_is_no_error(tmp_path: Path) -> None:
    path = made.write_events(tmp_path / "run.jsonl", [made.header("paci", clip_grad=0.0, trace_dir="/gone")])
    text = text_of(page_of(tmp_path, path))
    for said in (
        "PACI: no evaluation on validation data",
        "PACI: no training loss",
        "no log line in its metrics file, so no throughput",
        "PACI: no drain yet, and the bubble is measured from drain to drain",
        "PACI: no drain yet, and drift is written down at drains",
        "PACI: no gradient norm in its metrics file",
        "PACI: no memory was counted",
        "its trace is not in /gone any more",
        "not known before a drain",
    ):
        assert said in text, said
    assert "--rerun-mode is off under paci: it keeps every batch" in text
    assert "torchrun --nproc-per-node 4 pretrain_gpt_paci.py" in text and "torch 2.11.0" in text


def test_traces_are_found_where_the_run_wrote_them_and_beside_a_copy(tmp_path: Path) -> None:
    made.write_trace(tmp_path / "far" / "trace", "paci")
    run = made.write_events(tmp_path / "run.jsonl", made.training("paci", trace_dir=str(tmp_path / "far" / "trace")))

    def found(path: Path) -> ReportedRun:
        (only,) = read_runs([(None, path)])
        return only

    there = found(run).trace
    assert there is not None and there.folder == tmp_path / "far" / "trace"
    copied = tmp_path / "copy" / "run.jsonl"
    shutil.copytree(tmp_path / "far" / "trace", copied.parent / "trace")
    shutil.copy(run, copied)
    beside = found(copied.parent).trace
    assert beside is not None and beside.folder == copied.parent / "trace"
    (copied.parent / "trace" / "stage-2.jsonl").write_text("no trace\n")
    assert found(copied).trace is None and "stage-2.jsonl, line 1: not JSON" in found(copied).no_trace


def test_every_text_is_escaped(tmp_path: Path) -> None:
    evil = "<img>&</script><script>alert(1)</script>"
    made.write_trace(tmp_path / "trace", "paci")
    changed = made.training("paci", command=evil, set_up=[evil], device=evil, folder=evil, versions={evil: evil})
    reason = {"event": "fallback", "iteration": 5, "reason": evil}
    path = made.write_events(tmp_path / "a.jsonl", [*changed, reason])
    page = page_of(tmp_path, f"{evil}={path}")
    assert "<img" not in page and "<script>alert" not in page
    assert "<img>" not in json.dumps(data_of(page)), "plotly.js takes texts for HTML"
    assert page.count("&lt;img&gt;&amp;&lt;/script&gt;") > 10


def test_drift_in_units_of_weights_is_shown_where_it_was_measured(both: str, tmp_path: Path) -> None:
    assert len(data_of(both)["drift"]["Drift"]) == 2
    events = made.training("paci")
    for event in events:
        for stage in event.get("stages", ()):
            stage |= {"max_weight_change": 0.01 * event["iteration"], "mean_weight_change": 0.5 * stage["mean_drift"]}
    page = page_of(tmp_path, made.write_events(tmp_path / "run.jsonl", events))
    assert traces(page, "drift", 2)["PACI"]["y"] == [0.01 * made.ITERATIONS] * made.N
    assert traces(page, "drift", 3)["PACI"]["y"] == [0.5 * (made.N - 1 - stage) / made.A for stage in range(made.N)]


def test_bounds_know_the_slack_of_the_links(tmp_path: Path) -> None:
    events = made.training("paci", slack=[0, 4, 0])
    page = page_of(tmp_path, made.write_events(tmp_path / "run.jsonl", events))
    assert traces(page, "drift")["bound"]["y"] == [2, 2, 1, 0]


def test_large_runs_stay_small_pages(tmp_path: Path) -> None:
    events = [made.header("paci", num_stages=16)]
    for at in range(1, 6_001):
        position = {"iteration": at, "tokens": at * made.TOKENS, "train_s": at * 0.1, "time_s": at * 0.1}
        figures = {"loss": 3 + 1 / at, "ms_per_iteration": 100.0, "iterations": 1, "grad_norm": 1.0 + 1 / at}
        events.append({"event": "train", "schedule": "paci", **position, **figures, "grad_norm_iteration": at})
    path = made.write_events(tmp_path / "run.jsonl", events)
    made.write_trace(tmp_path / "run-trace", "paci", updates=4, num_stages=16, a=160)
    shutil.copy(path, other := tmp_path / "other.jsonl")
    shutil.copytree(tmp_path / "run-trace", tmp_path / "other-trace")
    page = page_of(tmp_path, path, other)
    assert (tmp_path / "report.html").stat().st_size < 8e6
    points = traces(page, "losses", 1, "Training loss")["run"]
    assert len(points["x"]) == 2000 and points["x"][-1] == 6_000 * made.TOKENS and points["y"][-1] == 3 + 1 / 6_000
    (drawn,) = data_of(page)["timeline"]["Timeline"]
    for axis in ("y", "y2", "y3", "y4"):
        actions = [t for t in drawn["data"] if t["yaxis"] == axis and t["name"] != "waiting"]
        assert 0 < sum(len(trace["x"]) for trace in actions) <= timeline.MOST_SPANS // 4
    assert f"as far as the first {timeline.MOST_SPANS // 4:,} actions" in text_of(page)


def test_thinned_points_are_means_and_end_where_the_run_does() -> None:
    assert measures.thin([(1.0, 2.0)], 2) == [(1.0, 2.0)]
    assert measures.thin([(float(i), 10.0 * i) for i in range(5)], 2) == [(1.0, 10.0), (4.0, 40.0)]


def test_without_plotly_the_line_to_type_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made.write_events(tmp_path / "run.jsonl", made.training("paci"))
    for name in [name for name in sys.modules if name.startswith("plotly.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)  # importing it fails as if it were not installed
    assert cli.main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 2
    message = "paci-megatron report: error: plotly is not installed: pip install 'paci-megatron[plot]'\n"
    assert capsys.readouterr().err == message and not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/none.jsonl --output {tmp}/r.html", "{tmp}/none.jsonl: no such file or folder; name a metrics file"),
        ("{tmp}/empty.jsonl --output {tmp}/r.html", "{tmp}/empty.jsonl: nothing in it"),
        ("{tmp}/binary.jsonl --output {tmp}/r.html", "{tmp}/binary.jsonl: not a metrics file"),
        ("{tmp}/text.jsonl --output {tmp}/r.html", "{tmp}/text.jsonl, line 1: not JSON"),
        ("{tmp}/other.jsonl --output {tmp}/r.html", "{tmp}/other.jsonl: not a metrics file"),
        ("{tmp}/list.jsonl --output {tmp}/r.html", "{tmp}/list.jsonl: not a metrics file"),
        ("{tmp}/part.jsonl --output {tmp}/r.html", "{tmp}/part.jsonl: not a metrics file"),
        ("{tmp}/folder --output {tmp}/r.html", "{tmp}/folder: no metrics file in it"),
        ("{tmp}/text.jsonl --output {tmp}/r.pdf", "--output {tmp}/r.pdf: not a page; end it in .html"),
        ("{tmp}/text.jsonl --output {tmp}/no/r.html", "--output {tmp}/no/r.html: no folder {tmp}/no"),
    ],
)
def test_what_cannot_be_read_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "text.jsonl").write_bytes(b"loss 3\n")
    (tmp_path / "other.jsonl").write_bytes(b'{"text": "a document"}\n')
    (tmp_path / "list.jsonl").write_bytes(b"[1]\n")
    (tmp_path / "part.jsonl").write_bytes(b'{"event": "train", "iteration": 1}\n')
    (tmp_path / "folder").mkdir()
    assert main(shlex.split(arguments.format(tmp=tmp_path))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"paci-megatron report: error: {message.format(tmp=tmp_path)}")
    assert not (tmp_path / "r.html").exists()
