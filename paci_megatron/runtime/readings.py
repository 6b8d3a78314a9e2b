"""What a window has to tell the host, read with the one wait for the device that an update has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paci_megatron.runtime.device import HostCopy


@dataclass(frozen=True)
class _Check:
    """A result that the device has judged, and what to do if it was rejected."""

    rejected: torch.Tensor
    reject: Callable[[], None]


class Readings:
    """Numbers of one stage that are computed on the device during a window, and looked at when it ends.

    Looking at one at once would make the host wait for the device in every micro-batch, and the device then for the host.
    """

    def __init__(self) -> None:
        self._values: dict[str, HostCopy] = {}
        self._checks: list[_Check] = []
        self._flags: HostCopy | None = None

    def check(self, rejected: torch.Tensor, reject: Callable[[], None]) -> None:
        """Call ``reject`` when the window ends, should ``rejected`` (one boolean) be true."""
        self._checks.append(_Check(rejected.detach().view(1), reject))

    def copy(self, name: str, value: torch.Tensor) -> None:
        """Start copying ``value``, to be read by :meth:`read`."""
        self._values[name] = HostCopy(value.detach())

    def read(self, name: str) -> torch.Tensor:
        """The value copied under ``name``, on the host."""
        return self._values.pop(name).wait()

    def begin(self) -> None:
        """The window's work is queued: start copying what was checked. Returns at once."""
        self._flags = HostCopy(torch.cat([check.rejected for check in self._checks])) if self._checks else None

    def end(self) -> None:
        """The device has been waited for: reject what it has rejected, in order."""
        checks, self._checks = self._checks, []
        if self._flags is not None:
            for check, is_rejected in zip(checks, self._flags.wait().tolist(), strict=True):
                if is_rejected:
                    check.reject()
        self._flags = None
