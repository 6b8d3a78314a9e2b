"""Drift in units of weights: by how much of themselves a stage's weights change between a forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAMPLE_SIZE = 64 * 1024


class WeightDrift:
    """The relative change |w_backward - w_forward| / |w_backward| of the micro-batches of one plan, by Frobenius norms.

    Of a sample, the same elements in every version: each k-th over all trained parameters of this rank, at most
    ``SAMPLE_SIZE`` of them, in fp32. Samples of the versions that micro-batches in flight were forwarded with are kept on
    the device, max drift + 1 of them. Nothing here waits for the device. Quantised parameters (``--fp8-param-gather``) are
    left out: a part of one cannot be read without a copy of all of it.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], sample_size: int = SAMPLE_SIZE) -> None:
        trained = [p for p in parameters if p.requires_grad and type(p.data) is torch.Tensor]
        self._step = max(1, -(-sum(parameter.numel() for parameter in trained) // sample_size))
        self._parts: list[tuple[torch.nn.Parameter, int]] = []  # and the first of its elements that is taken
        before = 0
        for parameter in trained:
            first = -before % self._step
            if first < parameter.numel():
                self._parts.append((parameter, first))
            before += parameter.numel()
        self._samples: dict[int, torch.Tensor] = {}
        self._changes: dict[tuple[int, int], torch.Tensor] = {}  # by the versions of forward and backward
        self._backwards: dict[tuple[int, int], int] = {}

    def forwarded(self, version: int) -> None:
        """A micro-batch has been forwarded with ``version``, which is in place, and whole since the forward has read it."""
        if version not in self._samples and self._parts:
            self._samples[version] = self._sample()

    def backwarded(self, forward_version: int, version: int) -> None:
        """A micro-batch has been backwarded with ``version``, which is in place. They come in the forwards' order."""
        if version == forward_version or not self._parts:
            return
        pair = forward_version, version
        if pair not in self._changes:
            self.forwarded(version)
            newest = self._samples[version]
            change = torch.linalg.vector_norm(newest - self._samples[forward_version])
            norm = torch.linalg.vector_norm(newest)
            self._changes[pair] = change / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            self._samples = {kept: sample for kept, sample in self._samples.items() if kept >= forward_version}
        self._backwards[pair] = self._backwards.get(pair, 0) + 1

    def take_window(self) -> tuple[torch.Tensor | None, list[int]]:
        """The changes since the last call, on the device, and of how many backwards each is; no change is not listed."""
        changes, backwards = list(self._changes.values()), list(self._backwards.values())
        self._changes, self._backwards = {}, {}
        return torch.stack(changes) if changes else None, backwards

    def _sample(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten()[first :: self._step] for parameter, first in self._parts]).float()
