"""Reads what trace.py writes: the stages' traces between two drains, and what can be told from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from paci_megatron.schedule import Action, Kind
from paci_megatron.simulate.costs import StageCosts
from paci_megatron.simulate.engine import Span

from .metrics_file import iter_metrics

EMBEDDING, LOSS, INPUT, OUTPUT = "embedding", "loss", "input", "output"
"""What comes before a stage's first layer and after its last: on the first stage the embedding, on the last one the final
norm, the output layer and the loss, elsewhere what a stage does besides its layers."""


def layer_part(number: int) -> str:
    """The name of transformer layer ``number``, from 1, of the whole model."""
    return f"layer {number}"


def trace_path(folder: str | Path, stage_index: int) -> Path:
    """A stage's file in the folder of ``--paci-trace-dir``."""
    return Path(folder) / f"stage-{stage_index}.jsonl"


@dataclass(frozen=True, slots=True)
class TracedAction:
    """An action of a stage as it was performed. ``start_s`` counts from where the trace's plan begins."""

    action: Action
    iteration: int
    start_s: float
    waiting_s: float
    compute_s: float
    transfer_s: float

    @property
    def end_s(self) -> float:
        """When it was done."""
        return self.start_s + self.waiting_s + self.compute_s + self.transfer_s


@dataclass
class StageStretch:
    """One stage from the beginning of a plan to the drain at its end, or as far as it was written."""

    header: dict[str, Any]
    actions: list[TracedAction] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """The iterations done before."""
        return int(self.header["after_iteration"])

    @cached_property
    def updates_s(self) -> list[float]:
        """When each update was done; the first entry is where the plan begins."""
        return [0.0, *(traced.end_s for traced in self.actions if traced.action.kind is Kind.UPDATE)]

    def between(self, first: int, last: int) -> list[TracedAction]:
        """What was performed in iterations ``first`` to ``last``."""
        return [traced for traced in self.actions if first <= traced.iteration <= last]

    def wall_s(self, first: int, last: int) -> float:
        """The time that iterations ``first`` to ``last`` took, from update to update."""
        return self.updates_s[last - self.begin] - self.updates_s[first - 1 - self.begin]


@dataclass
class Stretch:
    """All stages between two drains. Iterations ``first`` to ``last`` are complete on every one."""

    stages: list[StageStretch]

    @property
    def num_stages(self) -> int:
        """As many as there are files."""
        return len(self.stages)

    @property
    def microbatches_per_update(self) -> int:
        """Of the run that was traced."""
        return int(self.stages[0].header["microbatches_per_update"])

    @property
    def schedule(self) -> str:
        """``paci`` or ``1f1b``."""
        return str(self.stages[0].header["schedule"])

    @property
    def is_emulated(self) -> bool:
        """Whether the stages shared one process."""
        return bool(self.stages[0].header["emulated"])

    @property
    def first(self) -> int:
        """The first iteration."""
        return self.stages[0].begin + 1

    @property
    def last(self) -> int:
        """The last iteration that every stage has done."""
        return self.stages[0].begin + min(len(stage.updates_s) - 1 for stage in self.stages)

    def costs(self, first: int, last: int) -> tuple[StageCosts, ...]:
        """Each stage's median computing times in these iterations; an update's includes its report.

        ``ValueError`` if some stage has done no forward or backward in them.
        """
        return tuple(_stage_costs(stage.between(first, last)) for stage in self.stages)

    def spans(self, first: int, last: int) -> list[list[Span]]:
        """For each stage its actions in these iterations, with the waits, counted from when the first stage begins them.

        The stages' clocks are those of their machines.
        """
        begins_s = [stage.header["time_s"] + stage.updates_s[first - 1 - stage.begin] for stage in self.stages]
        return [list(_spans(stage, first, last, min(begins_s))) for stage in self.stages]


def _stage_costs(actions: Sequence[TracedAction]) -> StageCosts:
    seconds: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    for traced in actions:
        seconds[traced.action.kind].append(traced.compute_s)
    if not seconds[Kind.FORWARD] or not seconds[Kind.BACKWARD]:
        raise ValueError("no forward or no backward in these iterations; take more of them")
    update_s = sum(median(seconds[kind]) for kind in (Kind.REPORT, Kind.UPDATE) if seconds[kind])
    return StageCosts(median(seconds[Kind.FORWARD]), median(seconds[Kind.BACKWARD]), update_s=update_s)


def _spans(stage: StageStretch, first: int, last: int, begin_s: float) -> Iterator[Span]:
    offset_s = stage.header["time_s"] - begin_s
    for traced in stage.between(first, last):
        start_s = offset_s + traced.start_s + traced.waiting_s
        yield Span(traced.action, start_s, offset_s + traced.end_s, traced.waiting_s)


def read_trace(folder: str | Path, enough: int | None = None) -> list[Stretch]:
    """The stretches between drains that the files of ``--paci-trace-dir`` hold, in order, without those that not all stages
    have begun. Of an iteration that was traced again, after a kill, the last time counts. Of a long trace one stretch with
    ``enough`` iterations is read, and no more than these.

    ``ValueError`` if there is no trace, or a stage's file is missing.
    """
    first = read_stage(trace_path(folder, 0), enough)
    if not first:
        raise ValueError(f"{folder}: {trace_path(folder, 0).name} holds no plan; trace a run with --paci-trace-dir")
    num_stages = next(reversed(first.values())).header["num_stages"]
    stages = [first, *(read_stage(trace_path(folder, index), enough) for index in range(1, num_stages))]
    begun = set.intersection(*(set(stage) for stage in stages))
    stretches = [Stretch([stage[begin] for stage in stages]) for begin in first if begin in begun]
    return [stretch for stretch in stretches if {s.header["num_stages"] for s in stretch.stages} == {num_stages}]


def longest(stretches: Sequence[Stretch], folder: str | Path) -> Stretch:
    """The one with the most complete iterations; ``ValueError`` if no iteration is complete."""
    complete = [stretch for stretch in stretches if stretch.last >= stretch.first]
    if not complete:
        raise ValueError(f"{folder}: no iteration is complete on every stage; give a longer run")
    return max(complete, key=lambda stretch: stretch.last - stretch.first)


def read_stage(path: Path, enough: int | None = None) -> dict[int, StageStretch]:
    """A stage's stretches by the iterations done before, in order; see :func:`read_trace` for ``enough``. ``OSError`` if
    ``path`` cannot be read.
    """
    stretches: dict[int, StageStretch] = {}
    current: StageStretch | None = None
    full: int | None = None  # the beginning of a stretch that has enough
    updates = 0  # of the current one

    def is_wanted(line: str) -> bool:
        is_more = updates == enough or (current is not None and full not in (None, current.begin))
        return not is_more or line.startswith('{"event": "plan"')

    for event in iter_metrics(path, is_wanted):
        if event["event"] == "plan":
            current, updates = StageStretch(event), 0
            stretches.pop(current.begin, None)
            stretches[current.begin] = current
        elif current is None:
            raise ValueError(f"{path}: begins with {event['event']!r}, not with a plan; it is not a trace")
        elif event["event"] == "action":
            current.actions.append(_traced(event))
            updates += current.actions[-1].action.kind is Kind.UPDATE
            full = current.begin if updates == enough else full
        elif event["event"] == "layers":
            current.layers.append(event)
    return stretches


def _traced(event: dict[str, Any]) -> TracedAction:
    return TracedAction(
        Action.parse(event["action"]),
        event["iteration"],
        event["start_s"],
        event["waiting_s"],
        event.get("compute_s", 0.0),
        event.get("transfer_s", 0.0),
    )
