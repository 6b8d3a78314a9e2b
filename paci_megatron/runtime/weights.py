"""Which version of the weights a micro-batch meets: PACI's, and two older methods' for comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from .state import InFlight


class WeightVersions:
    """Puts the weight version in place that a forward or backward is to use. Versions count updates since the plan began.

    - ``latest``: the newest, always. This is PACI, and keeps no copies.
    - ``stash``: a backward uses its forward's version (PipeDream); up to ceil((N-1-s)/a) copies at stage s.
    - ``double-buffer``: all of a window uses the version before the window's own newest, at every stage alike
      (PipeDream-2BW); one copy. Two versions are enough only while the drift would be at most 1.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], policy: str, microbatches_per_update: int) -> None:
        self.version = 0
        self._parameters = parameters
        self._policy = policy
        self._microbatches_per_update = microbatches_per_update
        self._copies: dict[int, list[torch.Tensor]] = {}

    def for_forward(self, microbatch: int) -> int:
        """The version that ``microbatch`` is to be forwarded with."""
        if self._policy == "double-buffer":
            return max(microbatch // self._microbatches_per_update - 1, 0)
        return self.version

    def for_backward(self, entry: InFlight) -> int:
        """The version that ``entry`` is to be backwarded with."""
        return self.version if self._policy == "latest" else entry.forward_version

    @contextlib.contextmanager
    def in_place(self, version: int) -> Iterator[None]:
        """Inside, the parameters hold ``version``."""
        if version == self.version:
            yield
            return
        newest = self._copy()
        self._put(self._copies[version])
        try:
            yield
        finally:
            self._put(newest)

    def begin_update(self, in_flight: Iterable[InFlight]) -> None:
        """The newest version is about to be replaced: keep a copy if one in flight or yet to come needs it."""
        needed = {entry.forward_version for entry in in_flight}
        if self._policy == "double-buffer":
            needed = {self.version}
        if self._policy != "latest":
            self._copies = {version: copy for version, copy in self._copies.items() if version in needed}
            if self.version in needed:
                self._copies[self.version] = self._copy()

    def end_update(self) -> None:
        """The next version is in place."""
        self.version += 1

    @property
    def copied_bytes(self) -> int:
        """What the copies hold now."""
        return sum(tensor.nbytes for copy in self._copies.values() for tensor in copy)

    def _copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _put(self, values: list[torch.Tensor]) -> None:
        # Graphs in flight hold the parameters themselves, and are meant to see what is put there.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self._parameters)):
            torch._foreach_copy_(list(self._parameters), values)
