"""Where the host would wait for a GPU: every place that reads a tensor's value, while the pipeline is full."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from paci_megatron.runtime.device import HostCopy

# Reading any of these on a CUDA tensor makes the host wait until the device has computed it.
_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.nonzero,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
}
# The tests read losses to compare them. Data is made on the host; generators' states and the step counts of PyTorch's
# optimizers live there.
_ON_THE_HOST = (
    "/support/jobs.py:training_log",
    "/datasets/",
    "/torch/utils/data/",
    "/tensor_parallel/random.py",
    "/torch/optim/",
)


class _Reads(TorchFunctionMode):
    """Counts reads by the place in Megatron or in this project that asks, while ``counts``."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.counts = False
        self.on_host: list[torch.Tensor] = []  # what has been copied there

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_new_on_device = func is torch.tensor and "device" in (kwargs or {})  # a copy that is waited for
        if self.counts and (func in _READS or is_new_on_device) and not self._is_on_host(args):
            stack = _stack()
            if not any(part in f"{file}:{function}" for part in _ON_THE_HOST for file, function in stack):
                file, function = next((f, n) for f, n in stack if "megatron" in f and "platform/cpu.py" not in f)
                self.places[f"{Path(file).name}:{function}"] += 1
        return func(*args, **(kwargs or {}))

    def _is_on_host(self, args: Any) -> bool:
        return bool(args) and any(args[0] is tensor for tensor in self.on_host)


def _stack() -> list[tuple[str, str]]:
    """The files and functions that are running, the innermost first, up to the training run."""
    frame, stack = sys._getframe(2), []
    while frame is not None and frame.f_code.co_name != "pretrain":
        stack.append((frame.f_code.co_filename, frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return stack


@contextlib.contextmanager
def counted(path: str, first: int, last: int) -> Iterator[None]:
    """Write how often each place reads from after iteration ``first`` up to ``last`` to ``path``, as JSON.

    As on a GPU without Transformer Engine and Apex, the norm is taken on the device.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.training.training as training

    from paci_megatron.plugin import loop_patches
    from paci_megatron.plugin import run as runs

    reads, original, original_wait = _Reads(), training.train_step, HostCopy.wait
    norm, clip_grads.l2_norm_impl = clip_grads.l2_norm_impl, loop_patches.wrap_l2_norm_impl(clip_grads.l2_norm_impl)

    def train_step(*args: Any, iteration: int, **named: Any) -> Any:
        reads.counts = first <= iteration < last
        if (run := runs.current()) is not None:
            reads.on_host = [stage.optimizer.get_loss_scale() for stage in run.stages]
        return original(*args, iteration=iteration, **named)

    def wait(self: HostCopy) -> torch.Tensor:
        reads.on_host.append(original_wait(self))
        return reads.on_host[-1]

    training.train_step, HostCopy.wait = train_step, wait  # type: ignore[method-assign]
    with reads:
        yield
    HostCopy.wait = original_wait  # type: ignore[method-assign]
    training.train_step, clip_grads.l2_norm_impl = original, norm
    Path(path).write_text(json.dumps(reads.places), encoding="utf-8")


@contextlib.contextmanager
def device_synchronizations(path: str, first: int, last: int) -> Iterator[None]:
    """Write how often the whole device was waited for from after iteration ``first`` up to ``last`` to ``path``."""
    import megatron.training.training as training

    from paci_megatron.platform import cpu

    counts: dict[int, int] = {}
    original = training.train_step

    def train_step(*args: Any, iteration: int, **named: Any) -> Any:
        counts[iteration] = cpu.device_synchronizations
        return original(*args, iteration=iteration, **named)

    training.train_step = train_step
    try:
        yield
    finally:
        training.train_step = original
    Path(path).write_text(json.dumps(counts[last] - counts[first]), encoding="utf-8")
