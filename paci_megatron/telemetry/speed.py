"""How fast a run trains, from its log lines."""

from __future__ import annotations

from typing import NamedTuple

from .run_events import Event, named


class Interval(NamedTuple):
    """The iterations after ``start`` up to and including ``end``, of one log line."""

    start: int
    end: int
    tokens: int
    seconds: float


def log_intervals(events: list[Event]) -> list[Interval]:
    """The run's log intervals, in order."""
    intervals = []
    tokens = before = 0
    for event in named(events, "train"):
        end, count = event["iteration"], event["iterations"]
        seconds = count * event["ms_per_iteration"] / 1000
        # A resumed run does not go on where a log line ended.
        intervals.append(Interval(end - count, end, (event["tokens"] - tokens) * count // (end - before), seconds))
        tokens, before = event["tokens"], end
    return intervals


def steady_intervals(events: list[Event]) -> list[Interval]:
    """The log intervals in which the pipeline neither fills nor runs empty.

    The pipeline fills at a start (the first iteration is logged by itself) and after each drain, and runs empty at
    each drain. The same intervals are left out for 1F1B-flush, which does both in every iteration, so that the two
    schedules are timed over the same iterations.
    """
    drains = {event["iteration"] for event in events if event["event"] in ("drain", "run")}
    boundaries = {0, 1} | drains
    return [i for i in log_intervals(events) if not any(i.start <= b <= i.end for b in boundaries)]


def tokens_per_second(events: list[Event]) -> float:
    """Training speed in steady state: all tokens over all seconds. ``ValueError`` if no interval is steady."""
    intervals = steady_intervals(events)
    if not intervals:
        raise ValueError("no log interval lies strictly between two drains: train for more iterations")
    return sum(i.tokens for i in intervals) / sum(i.seconds for i in intervals)
