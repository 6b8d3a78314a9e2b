"""What stages measure of themselves, and what of it stands beside a log line."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import pytest
import torch

from paci_megatron.plugin.monitor import interval_line
from paci_megatron.runtime import meters
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.device import Stopwatch
from paci_megatron.runtime.meters import StageMeter, together_idle


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
    assert math.isnan(meter.interval_bubble), "none has ended"
    busy(meter, clock, 3, idle=1)
    meter.end_interval()
    assert meter.interval_bubble == pytest.approx(0.25)
    busy(meter, clock, 1, idle=1)
    assert meter.interval_bubble == pytest.approx(0.25), "the last one that has ended"
    meter.end_interval()
    assert meter.interval_bubble == pytest.approx(0.5)
    assert meter.take_figures().bubble_fraction == pytest.approx(1 - 4 / 6), "intervals take nothing from the report"
    assert math.isnan(meter.interval_bubble)


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


class Event:
    """A CUDA event on a device that has come as far as ``device_s``; recorded at what the next of ``marks`` says."""

    device_s = 0.0
    marks: ClassVar[list[float]] = []

    def record(self) -> None:
        self.at_s = Event.marks.pop(0)

    def query(self) -> bool:
        return self.at_s <= Event.device_s

    def synchronize(self) -> None:
        Event.device_s = max(Event.device_s, self.at_s)

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later.at_s - self.at_s)


def test_a_section_that_the_device_began_before_it_was_all_queued_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paci_megatron.runtime.device._timing_event", Event)
    monkeypatch.setattr(Event, "device_s", 0.0)
    watch = Stopwatch(torch.device("cuda"))
    monkeypatch.setattr(Event, "marks", [1.0, 3.0, 4.0, 6.0])
    watch.start()
    watch.stop()  # queued while the device is still before it: 2 seconds of computing, without gaps
    watch.start()
    Event.device_s = 5.0  # the device is at work on it while the host is still queueing
    watch.stop()
    assert watch.so_far_s() == 2 and watch.host_bound_s == 0, "the device has not come to the end of the second"
    Event.device_s = 7.0
    assert watch.so_far_s() == 4 and watch.host_bound_s == 2
    assert watch.take() == (4, 2) and watch.host_bound_s == 0


def test_the_line_says_how_much_more_the_bubble_may_be() -> None:
    total = Record(4.0, least_bubble=0.01, most_bubble=0.2, host_bound=0.12)
    assert "20.0% idlest (up to 12.0% more where a GPU waits for its host)" in interval_line(10, 9, total, 0)
    assert "more" not in interval_line(10, 9, total._replace(host_bound=0.0), 0)


def test_stages_of_a_process_that_take_turns_idle_together() -> None:
    assert together_idle([0.7, 0.5]) == pytest.approx(0.2)
    assert together_idle([0.5, 0.4]) == 0
    assert math.isnan(together_idle([0.5, math.nan]))
