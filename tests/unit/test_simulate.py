"""The simulator: every formula of the schedules, Megatron's own order, an independent calculation, and size."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import time
from fractions import Fraction
from random import Random
from types import SimpleNamespace

import pytest

from paci_megatron.schedule import Action, Kind, format_actions, parse_actions
from paci_megatron.schedule.actions import COMPUTE_KINDS
from paci_megatron.schedule.schedules import even_slack, flush_bubble_fraction, max_drift, max_in_flight, speedup_limit
from paci_megatron.simulate.advice import Scenario
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import Simulation, simulate
from paci_megatron.simulate.export import to_chrome_trace, to_csv, to_html
from paci_megatron.simulate.peers import find_schedule, interleaved
from paci_megatron.simulate.render import render_plans, render_timelines

SIZES = [(2, 2), (2, 4), (4, 2), (4, 8), (8, 4), (8, 8), (8, 16), (16, 7), (16, 32)]
WHOLE_GROUPS = [(2, 4), (4, 8), (4, 12), (8, 16), (8, 32)]
"""Sizes that can be interleaved, with enough micro-batches to reach the peak."""
LONG_WINDOWS = [(2, 4), (4, 8), (8, 16), (8, 24)]
"""At least 2N-1 micro-batches per update, which ZB-H2 has in flight."""
UPDATES = 5


def even(
    num_stages: int, forward: int, backward: int, weight: int | None = None, update: int = 0, latency: int = 0
) -> Costs:
    """Equal stages, in whole seconds, so that every result is exact."""
    return Costs((StageCosts(forward, backward, weight, update),) * num_stages, latency_s=latency)


def run(name: str, a: int, costs: Costs, updates: int = UPDATES) -> Simulation:
    return find_schedule(name).simulate(a, updates, costs)


def period(name: str, a: int, costs: Costs, updates: int = 8) -> Fraction:
    """Seconds an update takes when the pipeline neither fills nor drains for good, exactly."""
    marks = run(name, a, costs, 3 * updates).stages[0].marks
    return Fraction(marks[2 * updates].end_s - marks[updates].end_s) / updates


def bubbles(simulation: Simulation) -> list[Fraction]:
    """The idle share of each stage, exactly."""
    makespan = Fraction(simulation.makespan_s)
    return [1 - Fraction(stage.busy_s) / makespan for stage in simulation.stages]


@pytest.mark.parametrize(("n", "a"), SIZES)
@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (3, 4), (5, 2)])
def test_1f1b_flush(n: int, a: int, forward: int, backward: int) -> None:
    flush = run("1f1b", a, even(n, forward, backward))
    assert flush.makespan_s == UPDATES * (a + n - 1) * (forward + backward)
    assert bubbles(flush) == [Fraction(n - 1, a + n - 1)] * n
    assert flush.mean_bubble_fraction() == pytest.approx(flush_bubble_fraction(n, a))
    assert [flush.peak_activations(s) for s in range(n)] == [min(a, n - s) for s in range(n)]


@pytest.mark.parametrize(("n", "a"), WHOLE_GROUPS)
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved(n: int, a: int, chunks: int) -> None:
    forward, backward = 3 * 4, 6 * 4
    result = run(f"interleaved:{chunks}", a, even(n, forward, backward))
    ideal, extra = a * (forward + backward), (n - 1) * (forward + backward) // chunks
    assert result.makespan_s == UPDATES * (ideal + extra)
    assert bubbles(result) == [Fraction(n - 1, chunks * a + n - 1)] * n
    assert result.peak_activations(0) == pytest.approx(n + (n - 1) / chunks)
    assert result.stages[0].max_drift == 0


@pytest.mark.parametrize(("n", "a"), LONG_WINDOWS)
@pytest.mark.parametrize(("forward", "inputs", "weights"), [(1, 1, 1), (3, 3, 2), (2, 3, 2), (4, 5, 1)])
@pytest.mark.parametrize("level", [1, 2])
def test_zero_bubble(n: int, a: int, forward: int, inputs: int, weights: int, level: int) -> None:
    name = {1: "zb-h1", 2: "zb-2p"}[level]
    costs = even(n, forward, inputs + weights, weights)
    beyond_ideal = (n - 1) * (forward + inputs - level * weights)
    assert period(name, a, costs) == a * (forward + inputs + weights) + beyond_ideal
    peak = level * n - (level - 1)
    result = run(name, a, costs)
    assert [result.peak_activations(s) for s in range(n)] == [peak] * n, "the same on every stage"
    if forward == inputs == weights and level == 1:
        assert bubbles(run(name, a, costs, updates=1)) == [Fraction(n - 1, 3 * a + n - 1)] * n


@pytest.mark.parametrize(("n", "a"), SIZES)
@pytest.mark.parametrize("name", ["paci", "pipedream-2bw", "pipedream"])
def test_schedules_without_flush_fill_and_drain_once(n: int, a: int, name: str) -> None:
    result = run(name, a, even(n, 1, 2))
    assert result.makespan_s == (a * UPDATES + n - 1) * 3
    assert bubbles(result) == [Fraction(n - 1, a * UPDATES + n - 1)] * n
    assert [result.peak_activations(s) for s in range(n)] == [min(n - s, a * UPDATES) for s in range(n)]


@pytest.mark.parametrize(("n", "a"), [(2, 4), (4, 4), (8, 8), (8, 16)])
def test_extra_weights(n: int, a: int) -> None:
    scenario = Scenario(a, UPDATES, even(n, 1, 2))

    def copies(name: str) -> list[int]:
        return scenario.outcome(find_schedule(name)).extra_weight_copies

    for name in ("1f1b", "interleaved:2", "zb-h1", "zb-2p", "paci", "paci:2"):
        assert copies(name) == [0] * n
    assert copies("pipedream-2bw") == [1] * n
    assert copies("pipedream") == [n - s - 1 for s in range(n)]


@pytest.mark.parametrize(("n", "a"), itertools.product((4, 8, 16), (2, 4, 7, 8, 16)))
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_drift(n: int, a: int, extra: int) -> None:
    result = run(f"paci:{extra}", a, even(n, 1, 2), updates=40)
    for s, stage in enumerate(result.stages):
        ahead = max_in_flight(s, n, even_slack(n, extra)) - 1
        assert n - 1 - s <= ahead <= n - 1 - s + extra
        assert stage.max_drift == max_drift(s, n, a, even_slack(n, extra)) == math.ceil(ahead / a)
        first, last = stage.marks[20], stage.marks[40]
        mean = Fraction(last.drift_sum - first.drift_sum, last.backwards - first.backwards)
        assert mean == Fraction(ahead, a)
        assert result.mean_drift(s, 20) == pytest.approx(float(mean))
    if extra == 0:
        assert sum(result.mean_drift(s, 20) for s in range(n)) / n == pytest.approx((n - 1) / (2 * a))


@pytest.mark.parametrize(("n", "a"), [(8, 4), (8, 8), (8, 16), (16, 32)])
def test_throughput_limits(n: int, a: int) -> None:
    costs = even(n, 12, 24, weight=12)
    paci = period("paci", a, costs)
    assert paci == a * 36
    assert period("1f1b", a, costs) / paci == Fraction(a + n - 1, a)
    assert float(period("1f1b", a, costs) / paci) == speedup_limit(n, a)
    if a % n == 0:
        assert period("interleaved:4", a, costs) / paci == Fraction(4 * a + n - 1, 4 * a)
    if a >= n:
        assert period("zb-h1", a, costs) / paci == Fraction(3 * a + n - 1, 3 * a)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("latency", [0, 1, 6, 15, 30, 60, 90])
def test_latency_is_hidden_by_slack_between_stages_only(n: int, latency: int) -> None:
    """With p more in flight for each following stage, a round trip is shared by all that stage 0 has in flight."""
    forward, backward = 20, 40
    costs, compute = even(n, forward, backward, latency=latency), forward + backward
    round_trip = n * compute + 2 * latency * (n - 1)
    for slack in (0, 1, 2):
        in_flight = n + slack * (n - 1)
        # The pattern repeats after that many micro-batches: measure over a multiple.
        per_microbatch = period(f"paci:{slack * (n - 1)}", n, costs, updates=in_flight) / n
        assert per_microbatch == max(Fraction(compute), Fraction(round_trip, in_flight))
        assert (per_microbatch == compute) == (2 * latency <= slack * compute)
        if slack == 0:
            assert per_microbatch == compute + Fraction(2 * latency * (n - 1), n)


def test_slowest_stage_and_update_set_the_pace() -> None:
    stages = (StageCosts(1, 2), StageCosts(2, 5, update_s=3), StageCosts(1, 3))
    assert period("paci", 4, Costs(stages)) == 4 * 7 + 3


def test_bandwidth_delays_then_limits() -> None:
    fast, slow = (Costs((StageCosts(1, 2),) * 2, message_bytes=40, bandwidth_bytes_per_s=b) for b in (40, 10))
    assert fast.links_s == (1,) and slow.links_s == (4,)
    # Fast enough, a message's time on the link is latency; else messages queue and the link sets the pace.
    assert period("paci", 2, fast) == period("paci", 2, even(2, 1, 2, latency=1))
    assert period("paci:3", 2, slow) == 2 * 4
    assert period("paci:3", 2, even(2, 1, 2, latency=4)) == 2 * 3, "latency alone can be hidden"


def test_jitter_is_reproducible_bounded_and_costs_time() -> None:
    def makespan(jitter: float, seed: int = 0, name: str = "paci") -> float:
        return run(name, 8, Costs((StageCosts(1, 2),) * 8, jitter=jitter, seed=seed), updates=20).makespan_s

    assert makespan(0.2) == makespan(0.2) != makespan(0.2, seed=1)
    assert 1 < makespan(0.2) / makespan(0) < 1.2
    more = [makespan(0.2, name=f"paci:{extra}") for extra in (0, 1, 3, 7)]
    assert more == sorted(more, reverse=True), "each micro-batch more in flight gives slack between more stages"


def expected_spans(plans: list[list[Action]], costs: Costs) -> dict[tuple[int, Action], float]:
    """The end of every action by a second method: the longest path, relaxed until nothing changes."""
    last, folded = len(plans) - 1, any(action.chunk for plan in plans for action in plan)
    ends = {(stage, action): 0.0 for stage, plan in enumerate(plans) for action in plan}
    changed = True
    while changed:
        changed = False
        for stage, plan in enumerate(plans):
            free = 0.0
            for action in plan:
                step = {Kind.FORWARD: -1, Kind.BACKWARD: 1, Kind.INPUT_GRADIENT: 1}.get(action.kind, 0)
                source, chunk = stage + (-step if action.chunk else step), action.chunk
                if folded and step and source > last:  # the turn, where nothing is sent
                    source, chunk = stage, 1 - chunk
                start = free
                if step and 0 <= source <= last and (source, chunk) != (stage, action.chunk):
                    arrives = ends[source, Action(action.kind, action.index, chunk)]
                    start = max(free, arrives + (costs.latencies_s[min(stage, source)] if source != stage else 0))
                free = start + costs.stages[stage].seconds(action.kind) / (2 if folded else 1)
                changed |= free != ends[stage, action]
                ends[stage, action] = free
    return ends


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "zb-2p", "paci", "paci:2", "pipedream", "paci-v", "paci-v:1:2:1"])
@pytest.mark.parametrize("seed", range(4))
def test_random_costs_against_the_longest_path(name: str, seed: int) -> None:
    random = Random(seed)
    n, a = random.randint(2, 6), random.randint(1, 9)
    stages = []
    for _ in range(n):
        backward = random.randint(1, 30)
        stages.append(StageCosts(random.randint(1, 20), backward, random.randint(0, backward), random.randint(0, 9)))
    costs = Costs(tuple(stages), latency_s=random.randint(0, 15))
    result = find_schedule(name).simulate(a, 3, costs, record=True)
    plans = [[span.action for span in stage.spans] for stage in result.stages]
    found = {(s, span.action): span.end_s for s, stage in enumerate(result.stages) for span in stage.spans}
    assert found == expected_spans(plans, costs)
    for stage, run_of_stage in zip(stages, result.stages, strict=True):
        lengths = [span.end_s - span.start_s for span in run_of_stage.spans]
        chunks = find_schedule(name).chunks
        assert lengths == [stage.seconds(span.action.kind) / chunks for span in run_of_stage.spans]
        assert run_of_stage.busy_s == sum(lengths)


@pytest.mark.parametrize(("n", "a", "chunks"), [(2, 4, 2), (4, 4, 2), (4, 8, 3), (8, 16, 4)])
def test_interleaved_order_is_megatrons(n: int, a: int, chunks: int) -> None:
    from megatron.core.pipeline_parallel import schedules as megatron

    table = megatron.get_schedule_table(a, chunks, n)
    for stage in range(n):
        group = SimpleNamespace(size=lambda: n, rank=lambda stage=stage: stage)
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)
        _, _, warmup, _ = megatron.get_pp_rank_microbatches(a, chunks, n, p2p_communicator=communicator)
        plan = list(itertools.takewhile(lambda action: action.kind is not Kind.UPDATE, interleaved(stage, n, a, chunks)))
        forwards = [(action.index, action.chunk) for action in plan if action.kind is Kind.FORWARD]
        backwards = [(action.index, chunks - 1 - action.chunk) for action in plan if action.kind is Kind.BACKWARD]
        assert forwards == backwards == table
        kinds = "".join(action.kind for action in plan)
        steady = a * chunks - warmup
        assert kinds == "F" * warmup + "FB" * steady + "B" * warmup


def test_plans_of_the_peers_in_text() -> None:
    def text(name: str, stage: int) -> str:
        plan = find_schedule(name).actions(stage, 2, 4, 1)
        return format_actions(itertools.takewhile(lambda action: action.kind is not Kind.UPDATE, plan))

    assert text("zb-h1", 0) == "F0 F1 I0 W0 F2 I1 W1 F3 I2 W2 I3 W3"
    assert text("zb-h1", 1) == "F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3"
    assert text("zb-2p", 1) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"
    assert text("interleaved:2", 1) == "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3"
    assert format_actions(parse_actions(text("interleaved:2", 0))) == text("interleaved:2", 0)


@pytest.mark.parametrize(
    "name", ["", "gpipe", "paci:x", "interleaved", "interleaved:1", "zb-h1:2", "paci-v:1", "paci-v:1:2:"]
)
def test_unknown_schedule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is no schedule: choose from 1f1b, interleaved:CHUNKS")):
        find_schedule(name)


def test_interleaving_needs_whole_groups() -> None:
    with pytest.raises(ValueError, match="interleaved:2 does not exist for 6 micro-batches per update on 4 stages"):
        run("interleaved:2", 6, even(4, 1, 2))


def test_plans_that_do_not_match_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"stages \[0\] wait for ever"):
        simulate([parse_actions("F0 B0 F1 B1"), parse_actions("F0 B0")], even(2, 1, 2))
    with pytest.raises(ValueError, match="1 plans and costs of 2 stages"):
        simulate([parse_actions("F0 B0")], even(2, 1, 2))


def test_steady_throughput_leaves_out_the_fill() -> None:
    result = run("paci", 4, even(4, 1, 2), updates=10)
    assert result.microbatches_per_s() == pytest.approx(40 / (3 * 43))
    assert result.microbatches_per_s(after_update=5) == result.microbatches_per_s(2, 7) == pytest.approx(1 / 3)
    # Late in a drain a stage has backwards only, which is faster than the pipeline can go on.
    bound = Costs((StageCosts(1, 2),) * 8, jitter=0.4)
    result = run("paci:14", 8, bound, updates=12)
    assert result.microbatches_per_s(3, 9) < 1 / 3


@pytest.fixture
def timelines() -> dict[str, list[list]]:
    costs = Costs((StageCosts(0.1, 0.2, update_s=0.05),) * 2)
    schedules = [find_schedule(name) for name in ("paci", "interleaved:2")]
    return {s.title: [stage.spans for stage in s.simulate(2, 2, costs, record=True).stages] for s in schedules}


def test_csv_has_every_action(timelines: dict[str, list[list]]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(timelines))))
    assert len(rows) == sum(len(spans) for stages in timelines.values() for spans in stages)
    assert rows[1] == {
        "schedule": "PACI", "stage": "0", "action": "F1", "kind": "forward", "index": "1", "chunk": "0",
        "start_ms": "100", "end_ms": "200", "waiting_ms": "0",
    }  # fmt: skip


def test_chrome_trace_has_a_thread_a_stage(timelines: dict[str, list[list]]) -> None:
    events = json.loads(to_chrome_trace(timelines))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["PACI", "stage 0", "stage 1", "interleaved, v=2", "stage 0", "stage 1"]
    actions = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (0, 1)]
    assert [event["name"] for event in actions] == ["F0", "B0", "F1", "B1", "U1", "F2", "B2", "F3", "B3", "U2"]
    assert actions[0] == {"ph": "X", "name": "F0", "cat": "forward", "pid": 0, "tid": 1} | {
        "ts": pytest.approx(100_000), "dur": pytest.approx(100_000)
    }  # fmt: skip


def test_html_needs_nothing_else_and_shows_every_action(timelines: dict[str, list[list]]) -> None:
    page = to_html(timelines)
    assert "<h2>PACI</h2>" in page and "<script" not in page and "href" not in page
    rectangles = re.findall(r'<rect class="(\w)" .*?<title>(\S+) ', page)
    assert rectangles == [
        (str(span.action.kind), str(span.action)) for stages in timelines.values() for spans in stages for span in spans
    ]


def test_text_timeline(timelines: dict[str, list[list]]) -> None:
    assert render_timelines({"PACI": timelines["PACI"]}, max_columns=20).splitlines() == [
        "PACI, 50 ms a column",
        "stage  0: F0 =  F1 =  .  .  .  .  B0 =  =  =  F2 =  B1 =  =  =  U1 F3",
        "stage  1: .  .  F0 =  B0 =  =  =  F1 =  B1 =  =  =  U1 F2 =  B2 =  =",
    ]


def test_grid_of_a_plan_with_chunks() -> None:
    plans = [parse_actions("F0 F0.1 B0.1 B0 U1"), parse_actions("F0 F0.1 B0.1 B0 U1")]
    assert render_plans(plans).splitlines() == [
        "stage  0: F0   .    F0.1 .    .    B0.1 .    B0",
        "stage  1: .    F0   .    F0.1 B0.1 .    B0",
    ]


def test_only_compute_costs_time() -> None:
    assert {kind for kind in Kind if kind in COMPUTE_KINDS} == {Kind(letter) for letter in "FBIWU"}
    with_transfers = parse_actions("RF0 F0 SF0 RB0 B0 SB0 U1")
    assert simulate([with_transfers] * 2, even(2, 1, 2)).makespan_s == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_1024_stages_by_10000_micro_batches_in_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    begin_s = time.process_time()
    result = run("paci", 8, even(1024, 1, 2), updates=1250)
    took_s = time.process_time() - begin_s
    with capsys.disabled():
        print(f"\n1,024 stages x 10,000 micro-batches: {took_s:.1f} s of processor time")
    assert result.makespan_s == (10_000 + 1023) * 3
    assert took_s < 60
