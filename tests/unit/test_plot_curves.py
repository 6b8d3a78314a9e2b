"""Curves from metrics files and TensorBoard folders: what is read, what is drawn, what is refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary as torch_summary

from paci_megatron.cli import plot
from paci_megatron.telemetry import curves, plotting
from paci_megatron.telemetry.curve_figure import make_figure
from paci_megatron.telemetry.curves import Point, read_run, running_mean

TOKENS = 100  # an update's


def train(iteration: int, loss: float, train_s: float, iterations: int = 1, since_s: float = 0.0) -> dict[str, Any]:
    """A log line ``iterations`` and ``train_s - since_s`` seconds after the one before."""
    position = {"iteration": iteration, "tokens": TOKENS * iteration, "train_s": train_s, "time_s": train_s}
    ms_per_iteration = 1000 * (train_s - since_s) / iterations
    return {"event": "train", **position, "iterations": iterations, "loss": loss, "ms_per_iteration": ms_per_iteration}


def evaluation(iteration: int, loss: float, train_s: float, prefix: str = "") -> dict[str, Any]:
    event = train(iteration, loss, train_s)
    return {**event, "event": "evaluation", "prefix": prefix or f"iteration {iteration}", "perplexity": math.exp(loss)}


EVENTS = [
    train(1, 6.0, 2.0),
    train(10, 5.0, 20.0, 9, since_s=2.0),
    {"event": "drain", "iteration": 10, "stages": []},
    evaluation(10, 5.2, 20.0),
    train(20, 4.0, 40.0, 10, since_s=20.0),
    evaluation(20, 4.3, 40.0),
    evaluation(20, 4.5, 40.0, prefix="iteration 20 on validation set"),
    evaluation(20, 9.0, 40.0, prefix="iteration 20 on test set"),
]


def metrics_file(folder: Path, name: str = "run.jsonl", events: list[dict[str, Any]] | None = None) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(event) + "\n" for event in (EVENTS if events is None else events)))
    return path


def test_metrics_file_is_read(tmp_path: Path) -> None:
    run = read_run(metrics_file(tmp_path), "PACI")
    assert run.label == "PACI" and not run.is_wall_time
    assert run.train == [Point(1, 100, 2.0, 6.0), Point(10, 1000, 20.0, 5.0), Point(20, 2000, 40.0, 4.0)]
    # The last two evaluations are of different samples; the one of the test set is another thing.
    assert run.validation == [Point(10, 1000, 20.0, 5.2), Point(20, 2000, 40.0, 4.4)]


@pytest.mark.parametrize("waited_s", [0.0, 100.0])
def test_resumed_run_is_one_curve(tmp_path: Path, waited_s: float) -> None:
    """Killed after 30 iterations and resumed from a checkpoint of 15 in the same file, with a start of ``waited_s``."""
    killed = [*EVENTS, train(30, 3.0, 60.0, 10, since_s=40.0)]
    resumed = [train(20, 3.9, 11.0, iterations=5), evaluation(20, 4.1, 11.0), train(30, 3.5, 31.0, 10, since_s=11.0)]
    for late in resumed:
        late["time_s"] += waited_s
    run = read_run(metrics_file(tmp_path, events=[*killed, *resumed]), "r")
    # Iteration 15 was reached after 30 s, half-way between the points of 10 and 20.
    assert run.train[2:] == [Point(20, 2000, 41.0, 3.9), Point(30, 3000, 61.0, 3.5)]
    assert run.validation == [Point(10, 1000, 20.0, 5.2), Point(20, 2000, 41.0, 4.1)]


def test_second_run_in_the_same_file_replaces_the_first(tmp_path: Path) -> None:
    run = read_run(metrics_file(tmp_path, events=[*EVENTS, train(1, 7.0, 1.0), train(10, 6.5, 9.0, 9, since_s=1.0)]), "r")
    assert [(point.update, point.loss, point.seconds) for point in run.train] == [(1, 7.0, 1.0), (10, 6.5, 9.0)]
    assert run.validation == []


def event(wall_s: float, step: int, *values: Any) -> bytes:
    """An event with these summary values, as TensorBoard's writer frames it."""
    return record(Event(wall_time=wall_s, step=step, summary=Summary(value=values)).SerializeToString())


def record(content: bytes) -> bytes:
    written = io.BytesIO()
    RecordWriter(written).write(content)
    return written.getvalue()


def scalar(tag: str, value: float) -> Any:
    return Summary.Value(tag=tag, simple_value=value)


def tensorboard_folder(folder: Path, seq_length: str = "50", begin_s: float = 1000.0) -> Path:
    """300 updates of two samples, logged every hundredth, evaluated at the last."""
    folder.mkdir()
    records = [
        event(begin_s - 8, 0, *torch_summary.text("seq_length", seq_length).value),
        event(begin_s, 0, *torch_summary.text("lr", "1").value),
    ]
    for step, loss in ((100, 6.0), (200, 5.0), (300, 4.5)):
        records.append(event(begin_s + step, step, scalar("learning-rate", 0.1)))
        records.append(event(begin_s + step, step, scalar("lm loss", loss)))
        records.append(event(begin_s + step, 2 * step, scalar("lm loss vs samples", loss)))
    for loss in (4.25, 9.0):  # the second is of the test set, under the same name
        records.append(event(begin_s + 320, 300, scalar("lm loss validation", loss)))
        records.append(event(begin_s + 320, 600, scalar("lm loss validation vs samples", loss)))
    (folder / "events.out.tfevents.1700000000.host.1.0").write_bytes(b"".join(records))
    return folder


def test_tensorboard_folder_is_read(tmp_path: Path) -> None:
    run = read_run(tensorboard_folder(tmp_path / "tb"), "TB")
    assert run.is_wall_time
    assert run.train == [Point(100, 10_000, 0.0, 6.0), Point(200, 20_000, 100.0, 5.0), Point(300, 30_000, 200.0, 4.5)]
    assert run.validation == [Point(300, 30_000, 220.0, 4.25)]


def test_resumed_tensorboard_run_is_one_curve_and_a_cut_record_is_ignored(tmp_path: Path) -> None:
    folder = tensorboard_folder(tmp_path / "tb")
    first = next(folder.iterdir())
    first.write_bytes(first.read_bytes() + event(1, 400, scalar("lm loss", 1.0))[:-7])
    later = [event(5000.0, 250, scalar("lm loss", 4.75)), event(5000.0, 500, scalar("lm loss vs samples", 4.75))]
    (folder / "events.out.tfevents.1700005000.host.2.0").write_bytes(b"".join(later))
    run = read_run(folder, "TB")
    assert [(point.update, point.tokens, point.loss) for point in run.train] == [
        (100, 10_000, 6.0),
        (200, 20_000, 5.0),
        (250, 25_000, 4.75),
    ]


def test_tokens_of_a_tensorboard_folder_need_the_sequence_length(tmp_path: Path) -> None:
    folder = tensorboard_folder(tmp_path / "tb", seq_length="None")
    with pytest.raises(
        ValueError, match="TB: does not say how many tokens it has seen; choose another --x, or add --seq-length"
    ):
        curves.curve(read_run(folder, "TB"), "tokens", "loss", "train")
    assert curves.curve(read_run(folder, "TB", seq_length=10), "tokens", "loss", "train").x == [2000, 4000, 6000]
    assert curves.curve(read_run(folder, "TB"), "updates", "loss", "train").x == [100, 200, 300]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file or folder"),
        ("", "no losses in it"),
        ('{"event": "drain", "iteration": 3}\n', "no losses in it"),
        ("not JSON\n", "line 1: not JSON"),
        ('{"event": "train"}\n', "not a metrics file"),
        ("[1]\n", "not a metrics file"),
    ],
)
def test_missing_empty_and_wrong_files_are_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_run(path, "r")
    assert str(path) in str(error.value)


def test_folders_without_events_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no events\.out\.tfevents file"):
        read_run(tmp_path, "r")
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="no losses in it"):
        read_run(tmp_path, "r")
    file.write_bytes(record(b"\xff\xff\xff"))
    with pytest.raises(ValueError, match="not a TensorBoard event file"):
        read_run(tmp_path, "r")


def test_missing_split_is_refused_with_the_other(tmp_path: Path) -> None:
    run = read_run(metrics_file(tmp_path, events=EVENTS[:2]), "r")
    with pytest.raises(ValueError, match="r: no validation losses in it; choose --split train"):
        curves.curve(run, "tokens", "loss", "validation")


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4, 6, 8], 1) == [1, 2, 3, 4, 6, 8]
    assert running_mean([1, 2, 3, 4, 6, 8], 3) == pytest.approx([1, 2, 3, 13 / 3, 6, 7])
    assert running_mean([9, 1, 1, 1, 1, 5], 5) == pytest.approx([9, 11 / 3, 13 / 5, 9 / 5, 2, 7 / 3])


def figure_axes(runs: list[Path | str], tmp_path: Path, *options: str) -> Axes:
    """The axes of the picture that a command line describes."""
    argv = [*map(str, runs), "--output", str(tmp_path / "x.png"), *options]
    parsed = plot._parser("plot").parse_intermixed_args(argv)
    look = plot._look(parsed)
    read = [read_run(path, label, parsed.seq_length) for label, path in plot._named_paths(parsed.runs)]
    return make_figure(read, look).axes[0]


def line_data(axes: Any) -> list[list[tuple[float, float]]]:
    return [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.get_lines()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [(1000, 5.2), (2000, 4.4)]),
        (["--x", "updates"], [(10, 5.2), (20, 4.4)]),
        (["--x", "time"], [(20, 5.2), (40, 4.4)]),
        (["--y", "perplexity"], [(1000, math.exp(5.2)), (2000, math.exp(4.4))]),
        (["--split", "train"], [(100, 6.0), (1000, 5.0), (2000, 4.0)]),
        (
            ["--split", "train", "--y", "perplexity", "--x", "updates"],
            [(1, math.exp(6)), (10, math.exp(5)), (20, math.exp(4))],
        ),
    ],
)
def test_lines_are_the_metrics(tmp_path: Path, options: list[str], expected: list[tuple[float, float]]) -> None:
    axes = figure_axes([f"PACI={metrics_file(tmp_path)}"], tmp_path, *options)
    (line,) = line_data(axes)
    assert [number for point in line for number in point] == pytest.approx([n for point in expected for n in point])


def test_long_times_are_in_hours(tmp_path: Path) -> None:
    events = [evaluation(10, 5.0, 3600.0), evaluation(20, 4.0, 4 * 3600.0)]
    axes = figure_axes([metrics_file(tmp_path, events=events)], tmp_path, "--x", "time")
    assert line_data(axes) == [[(1.0, 5.0), (4.0, 4.0)]]
    assert axes.get_xlabel() == "training time (hours)"


def test_smoothed_line_is_over_the_faint_metrics(tmp_path: Path) -> None:
    axes = figure_axes([metrics_file(tmp_path)], tmp_path, "--split", "train", "--smooth", "3", "--x", "updates")
    raw, smoothed = line_data(axes)
    assert raw == [(1, 6.0), (10, 5.0), (20, 4.0)]
    assert smoothed == [(1, 6.0), (10, 5.0), (20, 4.5)]
    assert [line.get_alpha() for line in axes.get_lines()] == [0.25, None]


def test_runs_look_different_and_seeds_of_one_label_alike(tmp_path: Path) -> None:
    paths = [metrics_file(tmp_path, f"{name}.jsonl") for name in "abc"]
    tb = tensorboard_folder(tmp_path / "tb")
    axes = figure_axes([f"PACI={paths[0]}", f"flush={paths[1]}", f"PACI={paths[2]}", tb], tmp_path)
    handles, labels = axes.get_legend_handles_labels()
    assert labels == ["PACI", "flush", "tb"] and len(handles) == 3
    lines = axes.get_lines()
    assert lines[0].get_color() == lines[2].get_color()
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 3
    assert [len(line) for line in line_data(axes)] == [2, 2, 2, 1]


def test_labels_are_the_shortest_names_that_differ(tmp_path: Path) -> None:
    name = plot._named_paths
    assert name(["runs/a.jsonl", "b=x/c.jsonl"]) == [("a", Path("runs/a.jsonl")), ("b", Path("x/c.jsonl"))]
    assert [label for label, _ in name(["x/m.jsonl", "y/m.jsonl"])] == ["x/m.jsonl", "y/m.jsonl"]
    odd = tmp_path / "lr=1.jsonl"
    odd.write_text("")
    assert name([str(odd)]) == [("lr=1", odd)]


def test_log_axes_and_limits(tmp_path: Path) -> None:
    axes = figure_axes([metrics_file(tmp_path)], tmp_path, "--log", "xy", "--y", "perplexity", "--y-range", "50", "250")
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_ylim()) == ("log", "log", (50, 250))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["50", "60", "80", "100", "120", "150", "200", "250"]
    plain = figure_axes([metrics_file(tmp_path)], tmp_path)
    assert (plain.get_xscale(), plain.get_yscale()) == ("linear", "linear")


def test_inset_shows_the_end_of_every_curve(tmp_path: Path) -> None:
    long = [evaluation(10 * i, 5 - 0.1 * i, 10.0 * i) for i in range(1, 11)]
    short = [evaluation(10 * i, 5.05 - 0.1 * i, 5.0 * i) for i in range(1, 11)]
    paths = [metrics_file(tmp_path, "a.jsonl", long), metrics_file(tmp_path, "b.jsonl", short)]
    axes = figure_axes([*paths], tmp_path, "--x", "time", "--inset", "0.2")
    (inset,) = axes.child_axes
    assert inset.get_xlim() == pytest.approx((41, 100))
    low, high = inset.get_ylim()
    assert low < 4.0 and 4.5 < high < 4.6
    assert line_data(inset) == line_data(axes)
    assert not figure_axes([*paths], tmp_path).child_axes


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<?xml"), ("X.PDF", b"%PDF")])
def test_picture_is_of_the_kind_that_its_name_ends_in_and_always_the_same(tmp_path: Path, name: str, start: bytes) -> None:
    argv = [str(metrics_file(tmp_path)), "--output", str(tmp_path / name), "--inset", "--split", "train"]
    assert plot.main(argv, "plot_curves.py") == 0
    picture = (tmp_path / name).read_bytes()
    assert picture.startswith(start) and len(picture) > 3000
    assert plot.main(argv, "plot_curves.py") == 0
    assert (tmp_path / name).read_bytes() == picture


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--output", "x.gif"], "--output x.gif: not a kind of picture; end it in .png, .svg, .pdf"),
        (["--output", "no/x.png"], "--output no/x.png: no folder no; make it first"),
        (["--smooth", "0"], "--smooth 0: must be at least 1"),
        (["--inset", "1"], "--inset 1.0: must be above 0 and below 1"),
        (["--y-range", "3", "2"], "--y-range 3 2: LOW must be below HIGH; exchange them"),
        (["--y-range", "-1", "5", "--log", "y"], "--y-range -1 5: a logarithmic axis has no -1; give LOW above 0"),
        (["--y-range", "0", "5", "--log", "xy"], "--y-range 0 5: a logarithmic axis has no 0; give LOW above 0"),
        (["--y-range", "nan", "5"], "--y-range nan 5: both must be numbers"),
        (["--y-range", "1", "inf"], "--y-range 1 inf: both must be numbers"),
        (["--output", "/proc/x.png"], "--output /proc/x.png: cannot be written"),
        (["--title", "a \u13a0\U00012000"], "a \u13a0\U00012000: no font of this machine has"),
        (["--seq-length", "0"], "--seq-length 0: must be at least 1"),
        (["no/run.jsonl"], "no/run.jsonl: no such file or folder"),
    ],
)
def test_what_cannot_work_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert plot.main([str(metrics_file(tmp_path)), "--output", str(tmp_path / "x.png"), *options], "plot_curves.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plot_curves.py: error: {reason}")
    assert not (tmp_path / "x.png").exists()


NAN = float("nan")
UNDRAWABLE: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "all NaN": ([evaluation(i, NAN, 1.0 * i) for i in (1, 2)], [], "run: every validation loss is NaN or infinite"),
    "all NaN, inset": ([evaluation(i, NAN, 1.0 * i) for i in (1, 2)], ["--inset"], "run: every validation loss is NaN"),
    "all infinite": (
        [{**evaluation(i, 5.0, 1.0), "loss": 800.0} for i in (1, 2)],
        ["--y", "perplexity"],
        "run: every validation perplexity",
    ),
    "NaN at the end": (
        [evaluation(i, 5.0 if i < 5 else NAN, 1.0 * i) for i in range(1, 11)],
        ["--inset", "0.3"],
        "--inset 0.3: no finite value to enlarge; leave --inset out",
    ),
    "one point": ([evaluation(1, 5.0, 1.0)], ["--inset"], "--inset 0.25: one point to enlarge; leave --inset out"),
    "nothing above 0": (
        [evaluation(i, 0.0, 1.0 * i) for i in (1, 2)],
        ["--log", "y"],
        "--log y: run has no value above 0 on",
    ),
    "no time": (
        [evaluation(i, 5.0, 0.0) for i in (1, 2)],
        ["--log", "x", "--x", "time"],
        "--log x: run has no value above 0",
    ),
}


@pytest.mark.parametrize(("events", "options", "reason"), UNDRAWABLE.values(), ids=list(UNDRAWABLE))
def test_what_cannot_be_drawn_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], events: list[dict[str, Any]], options: list[str], reason: str
) -> None:
    argv = [str(metrics_file(tmp_path, events=events)), "--output", str(tmp_path / "x.png"), *options]
    assert plot.main(argv, "plot_curves.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"plot_curves.py: error: {reason}")
    assert not (tmp_path / "x.png").exists()


LABELS = ["_hidden", "$x^2$", "$broken_{", "__", "naïve ½ — ж", "_$_", "a_b^c\\d %"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["x.png", "x.svg", "x.pdf"])
def test_every_label_is_as_written(tmp_path: Path, name: str) -> None:
    run = str(metrics_file(tmp_path))
    title = "$ title_ $"
    argv = [*(f"{label}={run}" for label in LABELS), "--title", title, "--output", str(tmp_path / name)]
    assert plot.main(argv, "plot") == 0
    options = plot._parser("plot").parse_intermixed_args(argv)
    figure = make_figure([read_run(path, label) for label, path in plot._named_paths(options.runs)], plot._look(options))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == LABELS
    if name == "x.svg":
        written = [
            "".join(element.itertext()) for element in ElementTree.parse(tmp_path / name).iter() if "text" in element.tag
        ]
        assert {*LABELS, title} <= set(written)


@pytest.mark.filterwarnings("error")
def test_letters_that_no_font_has_are_for_whoever_shows_the_svg(tmp_path: Path) -> None:
    label = "\u7ba1\u9053 \U00012000"
    assert plot.main([f"{label}={metrics_file(tmp_path)}", "--output", str(tmp_path / "x.svg")], "plot") == 0
    assert label in (tmp_path / "x.svg").read_text()


def test_ticks_are_round_numbers_within_the_range() -> None:
    assert plotting.perplexity_ticks(75, 260) == pytest.approx([80, 100, 120, 150, 200, 250])
    assert plotting.perplexity_ticks(30, 3200) == pytest.approx([50, 100, 200, 500, 1000, 2000])


def test_numbers_are_short() -> None:
    counts = [plotting.short_count(value) for value in (0, 0.5, 999, 1500, 2e6, 49.8e9)]
    assert counts == ["0", "0.5", "999", "1.5k", "2M", "49.8B"]
    assert [plotting.time_unit(seconds)[1] for seconds in (179, 180, 10_799, 10_800)] == [
        "seconds",
        "minutes",
        "minutes",
        "hours",
    ]
