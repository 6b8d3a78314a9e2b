"""Traces: written as the device passes, read as they were written, drawn beside the simulation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from paci_megatron.cli.plan import main
from paci_megatron.runtime.device import DeviceClock
from paci_megatron.schedule import Action, Kind, paci
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import Simulation, simulate
from paci_megatron.telemetry import timelines
from paci_megatron.telemetry import trace as tracing
from paci_megatron.telemetry.metrics_file import read_metrics
from paci_megatron.telemetry.trace import StageTrace
from paci_megatron.telemetry.trace_file import longest, read_trace, trace_path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "trace_report.txt"
A, UPDATES = 3, 4
STAGES = (StageCosts(0.1, 0.2, update_s=0.03), StageCosts(0.1, 0.25, update_s=0.02), StageCosts(0.15, 0.2, update_s=0.04))


@dataclass
class FakeClock:
    """A device whose time is set, and which has passed what was marked at ``passed_s`` at the latest."""

    time_s: float = 0.0
    passed_s: float = float("inf")
    waited_for: list[float] = field(default_factory=list)

    def now(self) -> float:
        return self.time_s

    def has_passed(self, moment: float) -> bool:
        return moment <= self.passed_s

    def wait_for(self, moment: float) -> None:
        self.waited_for.append(moment)

    def seconds(self, since: float, until: float) -> float:
        assert since <= until
        return until - since


def stage_trace(folder: Path, clock: FakeClock, stage: int = 0, num_stages: int = 1) -> StageTrace:
    trace = StageTrace(folder, torch.device("cpu"), stage, num_stages, schedule="paci", emulated=False)
    trace._clock = clock  # type: ignore[assignment]
    return trace


def perform(trace: StageTrace, clock: FakeClock, action: Action, waiting_s: float, rest_s: float) -> None:
    trace.begin(action)
    clock.time_s += waiting_s
    if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.REPORT):
        trace.received()
    clock.time_s += rest_s
    trace.end()


def simulated(stages: Sequence[StageCosts] = STAGES) -> Simulation:
    """PACI from drain to drain, with times."""
    plans = [paci(stage, len(stages), A, lambda update: update == UPDATES) for stage in range(len(stages))]
    return simulate(plans, Costs(tuple(stages)), last_update=UPDATES, record=True)


def record(folder: Path, run: Simulation, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Write the trace of a run that goes as ``run`` does, each layer taking as long."""
    monkeypatch.setattr(tracing.time, "time", lambda: 1000.0)
    num_stages = len(run.stages)
    for index, stage in enumerate(run.stages):
        clock = FakeClock()
        trace = stage_trace(folder, clock, index, num_stages)
        trace._has_layers = True
        trace.begin_plan(A, after)
        for span in stage.spans:
            kind = span.action.kind
            trace.begin(span.action)
            clock.time_s = span.start_s  # waits for its input
            if kind in (Kind.FORWARD, Kind.BACKWARD):
                trace.received()
                step_s = (span.end_s - span.start_s) / 4
                layers = [f"layer {2 * index + 1}", f"layer {2 * index + 2}"]
                for part in ["before", *(layers if kind is Kind.FORWARD else layers[::-1])]:
                    clock.time_s += step_s
                    trace._part_done(part)
            clock.time_s = span.end_s
            trace.end()
        trace.end_plan()


def run_tool(arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    status = main(shlex.split(arguments))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_what_was_simulated_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = simulated()
    record(tmp_path, run, monkeypatch)
    stretch = longest(read_trace(tmp_path), tmp_path)
    assert (stretch.first, stretch.last, stretch.num_stages, stretch.microbatches_per_update) == (1, UPDATES, 3, A)
    for measured, costs in zip(stretch.costs(1, UPDATES), STAGES, strict=True):
        assert (measured.forward_s, measured.backward_s) == pytest.approx((costs.forward_s, costs.backward_s))
        assert measured.update_s == pytest.approx(costs.update_s)
    for measured_spans, stage in zip(stretch.spans(1, UPDATES), run.stages, strict=True):
        assert [span.action for span in measured_spans] == [span.action for span in stage.spans]
        ends_s = 0.0
        for measured_span, span in zip(measured_spans, stage.spans, strict=True):
            times_s = (measured_span.start_s, measured_span.end_s, measured_span.waiting_s)
            assert times_s == pytest.approx((span.start_s, span.end_s, span.start_s - ends_s), abs=1e-6)
            ends_s = span.end_s


@pytest.mark.parametrize("iterations", ["1:4", "2:3", "4:4"])
def test_measured_and_simulated_bubble_agree_by_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], iterations: str
) -> None:
    run = simulated()
    record(tmp_path, run, monkeypatch)
    out = json.loads(run_tool(f"--trace {tmp_path} --trace-iterations {iterations} --json --schedules paci", capsys))
    first, last = out["trace"]["iterations"]
    for stage, figures in zip(run.stages, out["trace"]["stages"], strict=True):
        assert figures["bubble_fraction"] == pytest.approx(figures["simulated_bubble_fraction"], abs=1e-5)
        wall_s = stage.marks[last].end_s - stage.marks[first - 1].end_s
        parts_s = [value for name, value in figures.items() if name.endswith("_s")]
        assert sum(parts_s) * (last - first + 1) == pytest.approx(wall_s, abs=1e-5), "all of the time went somewhere"
        if iterations == "1:4":
            assert figures["bubble_fraction"] == pytest.approx(1 - stage.busy_s / stage.end_s, abs=1e-5)
    assert [plan["microbatches_per_update"] for plan in out["plans"]] == [A]


def test_balance_from_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, simulated([StageCosts(0.1, 0.2), StageCosts(0.1, 0.2), StageCosts(0.4, 0.8)]), monkeypatch)
    out = json.loads(run_tool(f"--trace {tmp_path} --balance --json", capsys))
    # A quarter of each stage's 0.3 or 1.2 s: embedding or loss, two layers, and what is done besides.
    assert out["layers_s"] == pytest.approx([0.075] * 4 + [0.3] * 2)
    assert (out["embedding_s"], out["loss_s"]) == pytest.approx((0.075, 0.3))
    assert (out["after_receiving_s"], out["before_sending_s"]) == pytest.approx(((0.075 + 0.3) / 2, 0.075))
    assert (out["present"]["layout"], out["balanced"]["layout"]) == ("Et*2|t*2|t*2L", "Et*5|t|L")
    assert out["present"]["slowest_stage_s"] == pytest.approx(0.9 + 0.1875)
    assert out["balanced"]["slowest_stage_s"] == pytest.approx(0.675 + 0.075)
    assert out["speedup"] > 1.2
    text = run_tool(f"--trace {tmp_path} --balance --num-stages 4", capsys)
    assert text.count("--pipeline-model-parallel-layout '") == 2 and text.count("|") == 2 + 3


def test_golden_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, simulated(), monkeypatch)
    picture, shown = tmp_path / "picture.txt", tmp_path / "shown.txt"
    report = run_tool(f"--trace {tmp_path} --schedules paci --updates 10 --timeline {picture}", capsys)
    shown.write_text(report.replace(str(tmp_path), "TRACE") + picture.read_text(encoding="utf-8"), encoding="utf-8")
    command = f"cp {shown} {GOLDEN.relative_to(ROOT)}"
    assert shown.read_text(encoding="utf-8") == GOLDEN.read_text(encoding="utf-8"), f"if this is right now: {command}"


@pytest.mark.parametrize("ending", timelines.ENDINGS)
def test_measured_and_simulated_in_every_kind_of_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    record(tmp_path, simulated(), monkeypatch)
    path = tmp_path / f"drawn{ending}"
    run_tool(f"--trace {tmp_path} --trace-iterations 2:3 --timeline {path} --schedules paci", capsys)
    content = path.read_bytes()
    if ending == ".png":
        assert content.startswith(b"\x89PNG")
        return
    assert b"measured" in content and b"simulated" in content
    assert b"B3" in content and b"U3" in content, "iterations 2 and 3 of three micro-batches"
    assert b"B0" not in content and b"B9" not in content and b"U4" not in content
    if ending == ".html":
        assert b"waiting for a neighbour" in content and b"<table>" in content and b"ms of waiting for B" in content
    if ending == ".json":
        assert any(event["name"].startswith("wait B") for event in json.loads(content)["traceEvents"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_moments_on_a_gpu_pass_when_the_device_comes_to_them() -> None:
    clock = DeviceClock(torch.device("cuda"))
    begin = clock.now()
    torch.cuda._sleep(1 << 28)
    end = clock.now()
    assert not clock.has_passed(end)
    clock.wait_for(end)
    assert clock.has_passed(begin) and clock.has_passed(end) and clock.seconds(begin, end) > 0


def test_nothing_is_read_before_the_device_has_passed_it(tmp_path: Path) -> None:
    clock = FakeClock(passed_s=-1.0)
    trace = stage_trace(tmp_path, clock)
    trace.begin_plan(A, 0)
    waited_for = list(clock.waited_for)

    def actions_written() -> int:
        return sum(event["event"] == "action" for event in read_metrics(trace_path(tmp_path, 0)))

    for microbatch in range(tracing._BATCH * 3 - 1):
        perform(trace, clock, Action(Kind.FORWARD, microbatch), 0.0, 1.0)
    assert actions_written() == 0 and clock.waited_for == waited_for, "the device is far behind, and not waited for"
    clock.passed_s = float("inf")
    for microbatch in range(tracing._BATCH * 3 - 1, tracing._BATCH * 9):
        perform(trace, clock, Action(Kind.FORWARD, microbatch), 0.0, 1.0)
        assert len(trace._pending) <= tracing._BATCH * 3
    assert len(trace._pending) <= tracing._BATCH and clock.waited_for == waited_for, (
        "what has passed is written and forgotten"
    )
    trace.end_plan()
    assert actions_written() == tracing._BATCH * 9 and len(clock.waited_for) == len(waited_for) + 1


def test_a_kill_leaves_what_was_written_and_a_resumed_run_replaces_what_it_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, simulated(), monkeypatch)
    record(tmp_path, simulated(), monkeypatch, after=UPDATES)
    path = trace_path(tmp_path, 1)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-300], encoding="utf-8")
    killed = read_trace(tmp_path)
    assert [(s.first, s.last) for s in killed] == [(1, UPDATES), (UPDATES + 1, 2 * UPDATES - 1)]
    assert longest(killed, tmp_path) is killed[0]
    record(tmp_path, simulated(), monkeypatch, after=UPDATES)
    resumed = read_trace(tmp_path)
    assert [(s.first, s.last) for s in resumed] == [(1, UPDATES), (UPDATES + 1, 2 * UPDATES)]
    assert [len(stage.actions) for stage in resumed[1].stages] == [len(stage.actions) for stage in resumed[0].stages]


def test_of_a_long_trace_enough_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for after in (0, UPDATES, 2 * UPDATES, 0):  # begun again at the end
        record(tmp_path, simulated(), monkeypatch, after)
    whole, part = read_trace(tmp_path), read_trace(tmp_path, enough=2)
    assert [(s.first, s.last) for s in whole] == [(5, 8), (9, 12), (1, 4)]
    assert [(s.first, s.last) for s in part] == [(5, 4), (9, 8), (1, 2)], "what was begun again is read again"
    for stage, shorter in zip(whole[-1].stages, part[-1].stages, strict=True):
        assert shorter.actions == stage.between(1, 2) and len(shorter.updates_s) == 3


class Layer(torch.nn.Module):
    """A layer that takes some time in each direction."""

    def __init__(self, number: int, clock: FakeClock, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.layer_number = number
        self.linear = torch.nn.Linear(4, 4)
        self._clock, self._forward_s, self._backward_s = clock, forward_s, backward_s

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        self._clock.time_s += self._forward_s
        inside = self.linear(hidden_states)
        inside.register_hook(self._take_backward)
        return torch.tanh(inside), None

    def _take_backward(self, gradient: torch.Tensor) -> None:
        self._clock.time_s += self._backward_s


def test_each_layer_is_measured_in_both_directions(tmp_path: Path) -> None:
    clock = FakeClock()
    trace = stage_trace(tmp_path, clock, stage=1, num_stages=3)
    layers = [Layer(5, clock, 1.0, 10.0), Layer(6, clock, 2.0, 20.0)]
    trace.listen_to_layers(layers)
    received = torch.ones(2, 4, requires_grad=True)
    trace.begin_plan(A, 7)
    trace.begin(Action(Kind.FORWARD, 0))
    trace.received()
    clock.time_s += 0.25  # before the layers
    output: torch.Tensor = received
    for layer in layers:
        output, _ = layer(hidden_states=output)
    clock.time_s += 0.5  # after them
    trace.end()
    trace.begin(Action(Kind.BACKWARD, 0))
    trace.received()
    clock.time_s += 0.75
    output.sum().backward()
    clock.time_s += 1.25
    trace.end()
    layers[0](received)[0].sum().backward()  # an evaluation, outside the plan
    perform(trace, clock, Action(Kind.UPDATE, 1), 0.0, 1.0)
    trace.end_plan()
    (event,) = [event for event in read_metrics(trace_path(tmp_path, 1)) if event["event"] == "layers"]
    assert (event["iteration"], event["forwards"], event["backwards"]) == (8, 1, 1)
    assert event["forward_s"] == {"input": 0.25, "layer 5": 1.0, "layer 6": 2.0, "output": 0.5}
    assert event["backward_s"] == {"output": 0.75, "layer 6": 20.0, "layer 5": 10.0, "input": 1.25}


@pytest.mark.parametrize(("stage", "part"), [(0, "embedding"), (2, "loss")])
def test_a_stage_without_layers_is_all_embedding_or_loss(tmp_path: Path, stage: int, part: str) -> None:
    clock = FakeClock()
    trace = stage_trace(tmp_path, clock, stage, num_stages=3)
    trace.listen_to_layers([])
    trace.begin_plan(A, 0)
    perform(trace, clock, Action(Kind.FORWARD, 0), 1.0, 2.0)
    perform(trace, clock, Action(Kind.BACKWARD, 0), 1.0, 4.0)
    perform(trace, clock, Action(Kind.UPDATE, 1), 0.0, 1.0)
    trace.end_plan()
    (event,) = [event for event in read_metrics(trace_path(tmp_path, stage)) if event["event"] == "layers"]
    assert (event["forward_s"], event["backward_s"]) == ({part: 2.0}, {part: 4.0})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trace {trace} --trace-iterations 3", "--trace-iterations 3: expected FROM:TO"),
        ("--trace {trace} --trace-iterations 3:2", "--trace-iterations 3:2: expected FROM:TO"),
        ("--trace {trace} --trace-iterations 3:9", "not within a stretch between two drains of {trace}; it holds 1:4"),
        ("--trace {trace} --stage-ms 1:2", "--stage-ms, --metrics and --trace: give exactly one"),
        ("--trace {trace} --update-ms 3", "--update-ms 3: --trace has the time of an update; leave it out"),
        ("--trace {trace} --num-stages 2", "--num-stages 2: --trace has 3 stages"),
        ("--trace {trace} --balance --num-stages 9", "8 parts for 9 stages: each needs one; use at most 8 stages"),
        ("--trace {trace} --timeline drawn.svg", "--timeline drawn.svg: .svg; choose"),
        ("--trace {trace}/none", "stage-0.jsonl"),
        ("--stage-ms 1:2 --balance", "--balance needs --trace DIR"),
        ("--stage-ms 1:2 --trace-iterations 1:2", "--trace-iterations needs --trace DIR"),
    ],
)
def test_what_a_trace_cannot_answer_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    record(tmp_path, simulated(), monkeypatch)
    assert main(shlex.split(arguments.format(trace=tmp_path))) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message.format(trace=tmp_path) in captured.err


def test_a_trace_that_says_too_little_is_refused(tmp_path: Path) -> None:
    trace = stage_trace(tmp_path, FakeClock(), 0, num_stages=2)
    trace_path(tmp_path, 0).touch()
    with pytest.raises(ValueError, match="holds no plan; trace a run with --paci-trace-dir"):
        read_trace(tmp_path)
    trace.begin_plan(A, 0)
    with pytest.raises(OSError, match=r"stage-1\.jsonl"):
        read_trace(tmp_path)
    stage_trace(tmp_path, FakeClock(), 1, num_stages=2).begin_plan(A, 0)
    with pytest.raises(ValueError, match="no iteration is complete on every stage; give a longer run"):
        longest(read_trace(tmp_path), tmp_path)
