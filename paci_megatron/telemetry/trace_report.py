"""What a run's trace says: where the time went, beside what the simulation makes of it, and how to balance its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paci_megatron.schedule import Kind
from paci_megatron.schedule.actions import COMPUTE_KINDS, TRANSFER_KINDS
from paci_megatron.simulate.advice import Scenario
from paci_megatron.simulate.balance import Model, layout
from paci_megatron.simulate.costs import Costs
from paci_megatron.simulate.engine import Simulation, Span, simulate
from paci_megatron.simulate.peers import find_schedule
from paci_megatron.simulate.render import Timelines
from paci_megatron.usage import UsageError, require

from .timelines import write_timelines
from .trace_file import StageStretch, Stretch, longest, read_trace
from .trace_layers import layer_counts, measured_model


class TraceReport:
    """Some iterations of a traced run."""

    def __init__(self, folder: Path, iterations: str | None = None, enough: int | None = None) -> None:
        """Reads ``folder``, written by --paci-trace-dir, and of it the ``iterations`` FROM:TO or the longest stretch without
        drain; ``UsageError`` if it does not hold them. Of a long trace ``enough`` iterations are read.
        """
        self.folder = folder
        stretches = read_trace(folder, enough)
        if iterations is None:
            self.stretch = longest(stretches, self.folder)
            # A run's first iteration contains its start.
            self.first = min(self.stretch.first + 1, self.stretch.last)
            self.last = self.stretch.last
        else:
            self.first, self.last = _parse_iterations(iterations)
            self.stretch = _containing(stretches, self.first, self.last, self.folder)
        self.costs = self.stretch.costs(self.first, self.last)

    def simulation(self, costs: Costs) -> Simulation:
        """The traced plan, with these costs, from the drain before it to its last iteration that is reported."""
        plans = [[t.action for t in stage.actions if t.action.kind in COMPUTE_KINDS] for stage in self.stretch.stages]
        return simulate(plans, costs, last_update=self.last - self.stretch.first + 1, record=True)

    def figures(self, costs: Costs) -> list[dict[str, float]]:
        """Where each stage's time went, in seconds an iteration, its bubble, and the bubble simulated with ``costs``."""
        figures, count = [], self.last - self.first + 1
        begin, end = self.first - self.stretch.first, self.last - self.stretch.first + 1
        for stage, run in zip(self.stretch.stages, self.simulation(costs).stages, strict=True):
            wall_s, spent_s = stage.wall_s(self.first, self.last), self._spent(stage)
            computed_s = spent_s["forward"] + spent_s["backward"] + spent_s["update"]
            spent_s["other"] = max(wall_s - sum(spent_s.values()), 0.0)
            begin_s, end_s = run.marks[begin].end_s, run.marks[end].end_s
            simulated_s = sum(s.end_s - s.start_s for s in run.spans if begin_s <= s.start_s and s.end_s <= end_s)
            bubbles = {
                "bubble_fraction": max(1 - computed_s / wall_s, 0.0),
                "simulated_bubble_fraction": max(1 - simulated_s / (end_s - begin_s), 0.0),
            }
            figures.append({f"{name}_s": seconds / count for name, seconds in spent_s.items()} | bubbles)
        return figures

    def table(self, costs: Costs) -> list[list[str]]:
        """The figures, a row a stage below a head."""
        figures = self.figures(costs)
        times = [name for name in figures[0] if name.endswith("_s")]
        shares = [name for name in figures[0] if not name.endswith("_s")]
        rows = [["stage", *(f"{name[:-2]} (ms)" for name in times), "bubble", "simulated"]]
        for index, stage in enumerate(figures):
            rows.append(
                [str(index), *(f"{stage[name] * 1000:.4g}" for name in times), *(f"{stage[name]:.1%}" for name in shares)]
            )
        return rows

    def _spent(self, stage: StageStretch) -> dict[str, float]:
        spent_s = dict.fromkeys(("forward", "backward", "update", "waiting", "transfers"), 0.0)
        names = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.UPDATE: "update", Kind.REPORT: "update"}
        for traced in stage.between(self.first, self.last):
            spent_s["waiting"] += traced.waiting_s
            spent_s["transfers"] += traced.transfer_s
            if traced.action.kind not in TRANSFER_KINDS:
                spent_s[names[traced.action.kind]] += traced.compute_s
        return spent_s

    def draw(self, path: Path, costs: Costs, updates: int | None) -> str:
        """Write the measured timeline beside the simulated one, of ``updates`` iterations in the middle, of all if None.

        Returns which iterations it shows.
        """
        first, last = self.middle(updates)
        timelines: Timelines = {
            "measured": self.stretch.spans(first, last),
            "simulated": self.simulated_spans(costs, first, last),
        }
        write_timelines(path, timelines, self.table(costs), slot_s=min(stage.forward_s for stage in costs.stages) / 2)
        return f"iterations {first} to {last}"

    def middle(self, updates: int | None) -> tuple[int, int]:
        """The first and last of ``updates`` iterations in the middle of those reported, of all if there are no more."""
        first, last = self.first, self.last
        if updates is not None and updates < last - first + 1:
            first += (last - first + 1 - updates) // 2
            last = first + updates - 1
        return first, last

    def simulated_spans(self, costs: Costs, first: int, last: int) -> list[list[Span]]:
        """For each stage its actions in these iterations as simulated, counted from when the first stage begins them."""
        begin, end = first - self.stretch.first, last - self.stretch.first + 1
        runs = self.simulation(costs).stages
        begin_s = min(run.marks[begin].end_s for run in runs)
        return [
            [
                replace(span, start_s=span.start_s - begin_s, end_s=span.end_s - begin_s)
                for span in run.spans
                if run.marks[begin].end_s <= span.start_s and span.end_s <= run.marks[end].end_s
            ]
            for run in runs
        ]

    def title(self) -> str:
        """What is reported, in one line."""
        n, a = self.stretch.num_stages, self.stretch.microbatches_per_update
        where = " that took turns, several in a process," if self.stretch.is_emulated else ""
        return (
            f"{self.folder}: {self.stretch.schedule}, {n} stages{where}, {a} micro-batches per update, iterations "
            f"{self.first} to {self.last}, times of one iteration"
        )

    def balance(self, num_stages: int | None, updates: int) -> dict[str, Any]:
        """The layout whose slowest stage is fastest, on as many stages as the run has if None, beside the present one.

        Speeds are simulated, for PACI with a drain every ``updates`` updates.
        """
        model = measured_model(self.stretch, self.first, self.last)
        n = self.stretch.num_stages if num_stages is None else num_stages
        found: dict[str, Any] = {
            "embedding_s": model.embedding.seconds,
            "layers_s": [layer.seconds for layer in model.layers],
            "loss_s": model.loss.seconds,
            "after_receiving_s": model.after_receiving.seconds,
            "before_sending_s": model.before_sending.seconds,
        }
        for name, counts in (("present", layer_counts(self.stretch)), ("balanced", model.balance(n))):
            costs = self._costs(model, counts)
            scenario = Scenario(self.stretch.microbatches_per_update, updates, costs)
            found[name] = {
                "layout": layout(counts),
                "slowest_stage_s": max(stage.forward_s + stage.backward_s for stage in costs.stages),
                "microbatches_per_s": scenario.simulate(find_schedule("paci")).microbatches_per_s(),
            }
        found["speedup"] = found["balanced"]["microbatches_per_s"] / found["present"]["microbatches_per_s"]
        return found

    def _costs(self, model: Model, counts: Sequence[int]) -> Costs:
        """Of stages of so many parts. Updates are taken as evenly spread, since they follow the parameters."""
        update_s = sum(stage.update_s for stage in self.costs) / len(counts)
        return Costs(tuple(model.stage_costs(counts, update_s)))


def describe_balance(found: dict[str, Any]) -> str:
    """What :meth:`TraceReport.balance` found, for people."""
    lines = [
        "forward and backward of one micro-batch (ms): "
        f"embedding {_ms(found['embedding_s'])}, layers {' '.join(map(_ms, found['layers_s']))}, "
        f"final norm, output layer and loss {_ms(found['loss_s'])}, "
        f"a stage's own after receiving {_ms(found['after_receiving_s'])}, before sending {_ms(found['before_sending_s'])}"
    ]
    for name in ("present", "balanced"):
        layouts = found[name]
        lines.append(
            f"{name + ':':<9} --pipeline-model-parallel-layout '{layouts['layout']}', slowest stage "
            f"{_ms(layouts['slowest_stage_s'])} ms, simulated {layouts['microbatches_per_s']:.4g} micro-batches/s with PACI"
        )
    return "\n".join([*lines, f"speed-up: {found['speedup']:.3f}x"])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g}"


def _parse_iterations(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    well_formed = first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
    require(well_formed, f"--trace-iterations {text}: expected FROM:TO, the first and the last iteration, like 10:20")
    return int(first), int(last)


def _containing(stretches: Sequence[Stretch], first: int, last: int, folder: Path) -> Stretch:
    for stretch in stretches:
        if stretch.first <= first and last <= stretch.last:
            return stretch
    held = ", ".join(f"{stretch.first}:{stretch.last}" for stretch in stretches if stretch.first <= stretch.last)
    raise UsageError(
        f"--trace-iterations {first}:{last}: not within a stretch between two drains of {folder}; it holds {held or 'none'}"
    )
