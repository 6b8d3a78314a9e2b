"""What the host reads at an update: judged by the device before, rejected after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from paci_megatron.runtime.readings import Readings
from paci_megatron.runtime.saved import SavedActivations


def test_what_was_rejected_is_told_in_order_when_the_window_ends_and_once() -> None:
    readings, told = Readings(), []
    for name, value in (("one", 1.0), ("two", float("nan")), ("three", float("nan"))):
        readings.check(torch.isnan(torch.tensor(value)), lambda name=name: told.append(name))  # type: ignore[misc]
    readings.begin()
    assert told == []
    readings.end()
    assert told == ["two", "three"]
    readings.begin()
    readings.end()
    assert told == ["two", "three"]


def test_a_rejection_may_raise_and_what_was_copied_is_read_once() -> None:
    readings = Readings()

    def fail() -> None:
        raise RuntimeError("found NaN")

    readings.check(torch.tensor([True]), fail)
    readings.copy("loss", torch.tensor(2.5))
    readings.begin()
    assert float(readings.read("loss")) == 2.5
    with pytest.raises(KeyError):
        readings.read("loss")
    with pytest.raises(RuntimeError, match="found NaN"):
        readings.end()


def test_saved_activations_count_each_storage_once_and_no_weights() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    saved = SavedActivations([weight])
    given = torch.ones(4, 8, requires_grad=True)
    with saved.watched():
        first = (given @ weight).exp()  # saves given and weight, and the result
        second = (given @ weight).exp()
    assert saved.peak_bytes == (3 * 4 * 8) * 4
    first.sum().backward()
    del first
    with saved.watched():
        third = (given @ weight).exp()
    assert saved.peak_bytes == (3 * 4 * 8) * 4, "what a backward has freed is not counted any more"
    (second.sum() + third.sum()).backward()


def test_a_quantised_weight_is_a_weight_and_a_quantised_activation_counts_its_parts() -> None:
    """Transformer Engine's tensors consist of others, and have no memory of their own."""
    weight, activation = (TwoTensor(torch.ones(4), torch.ones(4)) for _ in range(2))
    saved = SavedActivations([torch.nn.Parameter(weight)])
    with saved.watched():
        output = Keep.apply(torch.ones(2, requires_grad=True), weight, activation)
    assert saved.peak_bytes == 2 * 4 * 4
    output.sum().backward()


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept)
        return given * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0] * len(ctx.saved_tensors), None, None
