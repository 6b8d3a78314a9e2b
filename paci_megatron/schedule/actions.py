"""The actions a stage performs, and their text form.

A plan is a stream of actions: ``F3`` is the forward of micro-batch 3, ``B3`` its backward, ``U2`` the second update.
``RF3``/``SF3`` receive and send the activation of micro-batch 3, ``RB3``/``SB3`` its gradient. ``R2`` and ``T2`` are the
report before update 2 and the total of all stages' reports, see records.py. Micro-batches count from
0 and updates from 1, so update k holds micro-batches (k-1)a .. ka-1. PACI-V, and schedules that PACI is compared with, split
the stage into chunks (``F3.1`` is on chunk 1), others the backward (``I3`` is the gradient of the input, ``W3`` that of the
weights).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache


class Kind(StrEnum):
    """What an action does; the value is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    UPDATE = "U"
    RECV_FORWARD = "RF"
    SEND_FORWARD = "SF"
    RECV_BACKWARD = "RB"
    SEND_BACKWARD = "SB"
    REPORT = "R"
    TOTAL = "T"


COMPUTE_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.UPDATE)
"""What a stage computes; the other kinds move things."""

TRANSFER_KINDS = (Kind.RECV_FORWARD, Kind.SEND_FORWARD, Kind.RECV_BACKWARD, Kind.SEND_BACKWARD, Kind.TOTAL)
"""What a stage does without computing anything. A REPORT is neither: it sums gradients up before it sends the sum."""

_TEXT = re.compile(r"(RF|SF|RB|SB|[FBIWURT])(\d+)(?:\.([1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a stage. ``index`` is the micro-batch (from 0), or for UPDATE, REPORT and TOTAL the update (from 1).

    ``chunk`` is the part of the stage's model, where a schedule has several: stage s holds parts s, N+s, 2N+s ..., in a V s
    and 2N-1-s.
    """

    kind: Kind
    index: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}" + (f".{self.chunk}" if self.chunk else "")

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``str()`` wrote as ``text``; ``ValueError`` if there is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no action: expected one of {', '.join(Kind)} and a number, like F3")
        return cls(Kind(match[1]), int(match[2]), int(match[3] or 0))


@lru_cache(maxsize=1 << 15)
def shared_action(kind: Kind, index: int, chunk: int = 0) -> Action:
    """``Action(kind, index, chunk)``, the same object for all stages: a simulation takes millions of them."""
    return Action(kind, index, chunk)


def format_actions(actions: Iterable[Action]) -> str:
    """The actions as one line of text, ``F0 F1 B0 U1``."""
    return " ".join(str(action) for action in actions)


def parse_actions(text: str) -> list[Action]:
    """The actions of a line that :func:`format_actions` wrote."""
    return [Action.parse(word) for word in text.split()]
