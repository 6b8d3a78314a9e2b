"""What people asked for and cannot have."""

from __future__ import annotations


class UsageError(ValueError):
    """A request that cannot work; the message names the value, the constraint and the remedy, in one line."""


def require(condition: bool, message: str) -> None:
    """``UsageError`` with that message unless the condition holds."""
    if not condition:
        raise UsageError(message)
