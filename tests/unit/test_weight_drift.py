"""How far weights move between a forward and its backward, as a stage measures it of a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paci_megatron.plugin.monitor import interval_line, stage_line
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.emulate import InProcessTransport
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.turns import run_to_update
from paci_megatron.runtime.weight_drift import WeightDrift
from paci_megatron.schedule.plan import Plan
from tests.support.toy_pipeline import Compute, ToyStage

UPDATES = 5


class Copies(Compute):
    """Keeps a full copy of the weights that each forward has met, and finds how far they are at its backward."""

    def __init__(self, stage: ToyStage, a: int) -> None:
        super().__init__(stage.model)
        self._stage, self._a = stage, a
        self._at_forward: dict[int, torch.Tensor] = {}
        self.changes: list[list[float]] = [[] for _ in range(UPDATES)]  # by window

    def _weights(self) -> torch.Tensor:
        return torch.cat([weight.flatten() for weight in self._stage.weights()])

    def forward(self, microbatch: int, activation: torch.Tensor | None) -> torch.Tensor:
        self._at_forward[microbatch] = self._weights()
        return super().forward(microbatch, activation)

    def backward(self, entry: Any, gradient: torch.Tensor | None) -> torch.Tensor | None:
        now = self._weights()
        change = torch.linalg.vector_norm(now - self._at_forward.pop(entry.microbatch)) / torch.linalg.vector_norm(now)
        self.changes[entry.microbatch // self._a].append(float(change))
        return super().backward(entry, gradient)


@pytest.mark.parametrize("a", [1, 2, 3])
def test_the_change_over_a_drift_is_that_of_full_copies_where_the_sample_is_everything(a: int) -> None:
    num_stages = 4
    plan = Plan("paci", num_stages, a, is_drain=lambda update: update == UPDATES)
    transport = InProcessTransport(num_stages, ties_embeddings=True, agree=lambda record: record)
    stages = [ToyStage(s, num_stages) for s in range(num_stages)]
    for stage in stages:
        stage.compute = Copies(stage, a)
        stage.begin(plan, transport)
    for _ in range(UPDATES):
        run_to_update(stages)
    for stage in stages:
        stage.end()
        copies = stage.compute
        assert isinstance(copies, Copies)
        measured = [
            [
                change
                for change, count in zip([] if changes is None else changes.tolist(), counts, strict=True)
                for _ in range(count)
            ]
            for changes, counts in stage.windows
        ]
        assert measured == [[change for change in window if change] for window in copies.changes]
        assert any(measured) == (stage.index < num_stages - 1), "the last stage has no drift"


def test_the_sample_is_each_kth_element_over_all_trained_parameters() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((5,), (2, 1), (4, 2), (3,))]
    parameters[-1].requires_grad = False
    drift = WeightDrift(parameters, sample_size=4)  # each fourth of 15
    drift.forwarded(0)
    for index, parameter in enumerate(parameters):
        with torch.no_grad():
            parameter.view(-1).copy_(torch.arange(parameter.numel()) + 10.0 * index)
    drift.backwarded(0, 1)
    drift.backwarded(0, 1)
    changes, backwards = drift.take_window()
    assert changes is not None and changes.tolist() == [1.0] and backwards == [2], "from zero it is all of them"
    assert drift._samples[1].tolist() == [0.0, 4.0, 21.0, 25.0]
    assert drift.take_window() == (None, [])


class Quantised(torch.Tensor):
    """A tensor of another class, as Transformer Engine's are."""


def test_quantised_weights_are_left_out() -> None:
    plain, quantised = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(5).as_subclass(Quantised))
    drift = WeightDrift([quantised, plain])
    drift.forwarded(0)
    assert drift._samples[0].tolist() == [1.0] * 3
    nothing = WeightDrift([quantised])
    nothing.forwarded(0)
    nothing.backwarded(0, 1)
    assert nothing.take_window() == (None, [])


def test_samples_of_versions_that_nothing_in_flight_has_met_are_let_go() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    drift = WeightDrift([parameter])
    for version in range(6):
        drift.forwarded(version)
        if version >= 2:
            drift.backwarded(version - 2, version)
            assert set(drift._samples) == {version - 2, version - 1, version}, "max drift + 1 of them"
        with torch.no_grad():
            parameter.mul_(2.0)
    changes, _ = drift.take_window()
    assert changes is not None and changes.tolist() == [0.75] * 4


def test_the_meter_and_the_lines_have_the_change_of_the_weights() -> None:
    meter = StageMeter(0, 2, torch.device("cpu"))
    meter.begin_plan(Plan("paci", 2, 1))
    for _ in range(4):
        meter.count_backward(drift=1)
    meter.count_weight_changes([0.5, 0.25], [1, 2])
    meter.count_weight_changes([0.125], [1])
    assert meter.window_weight_change == 0.125, "the last window's"
    assert "max drift: 1 (12% of the weights) |" in interval_line(10, 9, Record(max_drift=1.0, weight_change=0.125), 0)
    figures = meter.take_figures()
    assert (figures.max_weight_change, figures.mean_weight_change) == (0.5, 1.125 / 4)
    assert "| of the weights 28% |" in stage_line(10, [figures])
    assert meter.take_figures().mean_weight_change == 0.0
