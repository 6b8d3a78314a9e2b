"""A check, what came out of it, and how the outcomes are shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Status(StrEnum):
    """How a check ended."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"


class SkipCheck(Exception):
    """A check that says nothing here; the message is the reason."""


@dataclass(frozen=True)
class Measured:
    """What a check measured: ``holds`` says whether that is within the bound, ``figures`` are for programs."""

    holds: bool
    text: str
    figures: Any = None


@dataclass(frozen=True)
class Check:
    """``run`` measures; ``bound`` says what is asked of the measurement."""

    name: str
    bound: str
    run: Callable[[], Measured]


@dataclass(frozen=True)
class Outcome:
    """One line of the table. ``measured`` is the reason where the check was skipped, and the error where it broke."""

    name: str
    status: Status
    measured: str
    bound: str
    seconds: float
    figures: Any = None
    details: str = ""


def perform(check: Check) -> Outcome:
    """Run one check. Whatever it raises, but for an interrupt, makes it fail and ends no other."""
    begin_s = time.perf_counter()

    def outcome(status: Status, measured: str, figures: Any = None, details: str = "") -> Outcome:
        return Outcome(check.name, status, measured, check.bound, time.perf_counter() - begin_s, figures, details)

    try:
        measured = check.run()
    except SkipCheck as skip:
        return outcome(Status.SKIP, str(skip))
    except Exception as error:
        first, _, rest = str(error).partition("\n")
        return outcome(Status.FAIL, f"{type(error).__name__}: {first}", details=rest)
    return outcome(Status.PASS if measured.holds else Status.FAIL, measured.text, measured.figures)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a check: status, name, what was measured, and the bound."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    lines = []
    for outcome in outcomes:
        bound = f"  [{outcome.bound}]" if outcome.status is not Status.SKIP else ""
        lines.append(f"{outcome.status}  {outcome.name:{width}}  {outcome.measured}{bound}")
        lines += [f"      {line}" for line in outcome.details.splitlines()]
    counts = ", ".join(f"{sum(o.status is status for o in outcomes)} {status}" for status in Status)
    return "\n".join([*lines, counts])


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """1 if any check failed, else 0."""
    return int(any(outcome.status is Status.FAIL for outcome in outcomes))


def write_json(path: Path, machine: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """``{"machine", "passed", "checks": [...]}``, readable by programs."""
    content = {"machine": machine, "passed": not exit_status(outcomes), "checks": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
