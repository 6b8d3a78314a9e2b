"""The bytes that a stage's forwards leave for its backwards."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch


class SavedActivations:
    """Counts what autograd saves while it is watched, each storage once, and without the weights.

    Transformer Engine's quantised copies of weights are counted, once.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.peak_bytes = 0
        self._weights = {part.untyped_storage().data_ptr() for weight in weights for part in _parts(weight)}
        self._holders: Counter[int] = Counter()  # saved tensors by storage
        self._held_bytes = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is saved inside, until it is freed, inside or outside."""
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda saved: saved.tensor):
            yield

    def _save(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(tensor, self)

    def add(self, storage: int, size: int) -> None:
        """One more saved tensor in ``storage``, of ``size`` bytes."""
        if storage in self._weights:
            return
        self._holders[storage] += 1
        if self._holders[storage] == 1:
            self._held_bytes += size
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def remove(self, storage: int, size: int) -> None:
        """One saved tensor less."""
        if storage in self._weights:
            return
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self._held_bytes -= size


class _Saved:
    """A tensor that autograd holds, for as long as it does."""

    def __init__(self, tensor: torch.Tensor, counter: SavedActivations) -> None:
        self.tensor = tensor
        self._counter = counter
        storages = [part.untyped_storage() for part in _parts(tensor)]
        self._held = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        for storage, size in self._held:
            counter.add(storage, size)

    def __del__(self) -> None:
        for storage, size in self._held:
            self._counter.remove(storage, size)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in whose memory ``tensor`` is: itself, or the data and scales that a quantised one consists of."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return [tensor]
    return [part for part in vars(tensor).values() if type(part) is torch.Tensor] or [tensor]
