"""Transfers between two stages of one process: what one sends is kept until the other takes it."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from .control import Record


class HandOver:
    """Both ends of a direction between two stages of this process, of which the first sends before the second receives."""

    def __init__(self) -> None:
        self._sent: deque[Any] = deque()

    def send(self, sent: Any) -> None:
        """See :class:`~.links.Outgoing`."""
        self._sent.append(sent)

    def post(self) -> None:
        """Nothing to get ready."""

    def has_arrived(self) -> bool:
        """Whether something was sent that has not been received."""
        return bool(self._sent)

    def receive(self) -> Any:
        """What was sent earliest."""
        return self._sent.popleft()

    def drain(self) -> None:
        """``RuntimeError`` if something was sent and never used."""
        if self._sent:
            raise RuntimeError(f"{len(self._sent)} under way between two stages at a drain: a bug in the plan")


class LocalRecords(NamedTuple):
    """Records to and from another stage of this process."""

    outgoing: HandOver
    incoming: HandOver

    def post(self) -> None:
        """Nothing to get ready."""

    def has_arrived(self) -> bool:
        """Whether there is a record to receive."""
        return self.incoming.has_arrived()

    def receive(self) -> Record:
        """The other stage's next record."""
        record: Record = self.incoming.receive()
        return record

    def send(self, record: Record) -> None:
        """Hand a record over."""
        self.outgoing.send(record)

    def drain(self) -> None:
        """``RuntimeError`` if a record was not read."""
        self.incoming.drain()
