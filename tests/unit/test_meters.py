"""What stages measure of themselves, and what of it stands beside a log line."""

from __future__ import annotations

import functools

import pytest
import torch

from paci_megatron.plugin.monitor import interval_line
from paci_megatron.runtime import meters
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.meters import StageMeter


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters.time, "perf_counter", clock.perf_counter)
    return clock


def busy(meter: StageMeter, clock: Clock, seconds: float, idle: float) -> None:
    with meter.computing():
        clock.now_s += seconds
    clock.now_s += idle


def test_an_interval_measures_itself_only(clock: Clock) -> None:
    meter = StageMeter(0, 2, torch.device("cpu"))
    assert meter.bubbles == (1.0, 0.0), "none has ended"
    busy(meter, clock, 3, idle=1)
    meter.end_interval()
    assert meter.bubbles == (pytest.approx(0.25), pytest.approx(0.25))
    busy(meter, clock, 1, idle=1)
    assert meter.bubbles[0] == pytest.approx(0.25), "the last one that has ended"
    meter.end_interval()
    assert meter.bubbles[0] == pytest.approx(0.5)
    assert meter.take_figures().bubble_fraction == pytest.approx(1 - 4 / 6), "intervals take nothing from the report"
    assert meter.bubbles == (1.0, 0.0)


def test_a_total_has_the_busiest_and_the_idlest_of_the_stages_that_know() -> None:
    stages = [
        Record(least_bubble=0.25, most_bubble=0.25, max_drift=2.0),
        Record(max_drift=1.0),  # its interval has not ended
        Record(least_bubble=0.125, most_bubble=0.125),
    ]
    total = functools.reduce(lambda later, own: own.plus(later), reversed(stages))
    assert (total.least_bubble, total.most_bubble, total.max_drift) == (0.125, 0.25, 2.0)
    assert Record(*total.to_save()) == Record(), "nothing that depends on timing is saved"


def test_the_line_beside_megatrons_says_what_is_known() -> None:
    known = Record(squared_norm=4.0, least_bubble=0.01, most_bubble=0.2, max_drift=1.0)
    assert interval_line(10, 9, known, skipped=3) == (
        "paci-megatron: iteration       10 | grad norm: 2.000 (of iteration 9) | bubble: 1.0% busiest stage, 20.0% idlest | "
        "max drift: 1 | skipped updates: 3 |"
    )
    assert "bubble" not in interval_line(10, 9, Record(squared_norm=4.0), skipped=0)
