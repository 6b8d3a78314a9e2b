"""The actions a stage performs, and their text form.

A plan is a stream of actions: ``F3`` is the forward of micro-batch 3, ``B3`` its backward, ``U2`` the second update.
``RF3``/``SF3`` receive and send the activation of micro-batch 3, ``RB3``/``SB3`` its gradient. Micro-batches count from
0 and updates from 1, so update k holds micro-batches (k-1)a .. ka-1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an action does; the value is its text form."""

    FORWARD = "F"
    BACKWARD = "B"
    UPDATE = "U"
    RECV_FORWARD = "RF"
    SEND_FORWARD = "SF"
    RECV_BACKWARD = "RB"
    SEND_BACKWARD = "SB"


_TEXT = re.compile(r"(RF|SF|RB|SB|F|B|U)(\d+)")


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a stage. ``index`` is the micro-batch (from 0), or the update (from 1) if ``kind`` is UPDATE."""

    kind: Kind
    index: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``str()`` wrote as ``text``; ``ValueError`` if there is none."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no action: expected one of {', '.join(Kind)} and a number, like F3")
        return cls(Kind(match[1]), int(match[2]))


def format_actions(actions: Iterable[Action]) -> str:
    """The actions as one line of text, ``F0 F1 B0 U1``."""
    return " ".join(str(action) for action in actions)


def parse_actions(text: str) -> list[Action]:
    """The actions of a line that :func:`format_actions` wrote."""
    return [Action.parse(word) for word in text.split()]
