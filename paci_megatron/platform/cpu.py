"""Stand-ins that let Megatron run without CUDA, over gloo, on the CPU.

Megatron names the CUDA device in many places: ``device="cuda"``, ``tensor.cuda()``, ``torch.cuda.current_device()``,
``"torch.cuda.FloatTensor"``. On a machine without one, :func:`activate` answers all of them with the CPU: the functions
that take a device rewrite it, and a fixed list of ``torch.cuda`` names gets a CPU counterpart. (A ``TorchFunctionMode``
would need no list, but costs microseconds in every tensor function: a third of a millisecond in each forward or backward.)
It must run before ``megatron`` is imported, because Megatron binds some of these names at import time.
Nothing here is active on a machine that has a CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

_saved: list[tuple[Any, str, Any]] = []
_active = False
_poses = False  # as a GPU, see assumed.py
_warning_filters: list[Any] = []
# What is said of a GPU that is not there, and repeated on every rank. The device's generator is the CPU's here, so the one
# changing with the other is no sign of a mistake.
_UNTRUE = {
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
# One line at start says what is used instead of what is missing; Megatron would say it once per module and process.
_UNTRUE_WARNINGS = r".*(not installed.*(Falling back|Using)|Only transformer-engine|'pin_memory' argument is set as true)"


def _is_true_here(record: logging.LogRecord) -> bool:
    return _UNTRUE[record.name] not in record.getMessage()


def is_active() -> bool:
    """Whether the stand-ins are in place, and do not pose as a GPU."""
    return _active and not _poses


def pose_as_gpu(capability: tuple[int, int]) -> None:
    """Let the stand-ins, which must be in place, say that there is a GPU of this compute capability."""
    global _poses
    _poses = True
    torch.cuda.get_device_capability = lambda device=None: capability
    _DeviceProperties.major, _DeviceProperties.minor = capability


def activate() -> bool:
    """Put the stand-ins in place if there is no CUDA device; returns whether they are in place afterwards."""
    global _active
    if _active:
        return True
    if torch.cuda.is_available():
        return False
    _warning_filters[:] = warnings.filters
    warnings.filterwarnings("ignore", message=_UNTRUE_WARNINGS)
    for name in _UNTRUE:
        logging.getLogger(name).addFilter(_is_true_here)
    for owner, name, replacement in _replacements():
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, replacement)
    _active = True
    return True


def deactivate() -> None:
    """Undo :func:`activate`. For tests; a training process keeps the stand-ins to its end."""
    global _active
    if not _active:
        return
    _active = False
    for name in _UNTRUE:
        logging.getLogger(name).removeFilter(_is_true_here)
    warnings.filters[:] = _warning_filters  # type: ignore[index]
    while _saved:
        owner, name, original = _saved.pop()
        setattr(owner, name, original)


# What a CPU run cannot use, and what it uses instead. Each is only changed from a value that needs a GPU.
_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("distributed_backend", "gloo"),
    ("transformer_impl", "local"),
    ("gradient_accumulation_fusion", False),
    ("masked_softmax_fusion", False),
    ("bias_gelu_fusion", False),
    ("bias_swiglu_fusion", False),
    ("bias_dropout_fusion", False),
    ("no_persist_layer_norm", True),
    ("apply_rope_fusion", False),
)


def adapt_arguments(args: argparse.Namespace) -> list[str]:
    """Set the Megatron arguments that need a GPU to their CPU values. Returns the ones changed, for the log."""
    from megatron.core.transformer.enums import AttnBackend

    changed = []
    for name, value in (*_ARGUMENTS, ("attention_backend", AttnBackend.unfused)):
        if hasattr(args, name) and getattr(args, name) != value:
            setattr(args, name, value)
            changed.append(f"{name}={getattr(value, 'name', value)}")
    # Megatron insists on it with tensor or context parallelism; it orders kernels on a GPU and means nothing here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return changed


def _is_cuda(device: Any) -> bool:
    """Whether ``device`` names a CUDA device in any of the forms PyTorch accepts."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """``original`` with a CUDA ``device`` among its named arguments rewritten to the CPU."""

    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs["device"] = CPU
        return original(*args, **kwargs)

    return on_cpu


def _to_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to``, whose device may be unnamed."""
    named = _on_cpu(original)

    @functools.wraps(original)
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        return named(tensor, *args, **kwargs)

    return to


def _cuda_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.type``. Megatron's optimizers accept a parameter only if its type string is a CUDA one."""

    @functools.wraps(original)
    def type_of(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return f"torch.cuda.{result.rpartition('.')[2]}" if isinstance(result, str) else result

    return type_of


_TENSOR_CONSTRUCTORS = ("new_tensor", "new_empty", "new_empty_strided", "new_full", "new_zeros", "new_ones")


def _device_functions() -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in) for every function that makes a tensor on a device."""
    found: list[tuple[Any, str]] = []
    constructors = _device_constructors()
    for owner in (torch, torch.fft, torch.nested):
        functions = [name for name in dir(owner) if callable(getattr(owner, name)) and not name.startswith("_")]
        found += [(owner, name) for name in functions if getattr(owner, name) in constructors or name.endswith("_like")]
    found += [(torch.Tensor, name) for name in _TENSOR_CONSTRUCTORS]
    table: list[tuple[Any, str, Any]] = [(owner, name, _on_cpu(getattr(owner, name))) for owner, name in found]
    table.append((torch.Tensor, "to", _to_cpu(torch.Tensor.to)))
    table.append((torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor))
    table.append((torch.Tensor, "type", _cuda_type(torch.Tensor.type)))
    return table


class _Stream:
    """A CUDA stream on a device that has only one queue: everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event if event is not None else _Event()

    def query(self) -> bool:
        return True


class _Event:
    """A CUDA event on a device that finishes each operation before the next begins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _DeviceProperties:
    """What Megatron asks of a device: a name, a compute capability (none), and the memory size in bytes."""

    name = "cpu"
    major = 0
    minor = 0
    multi_processor_count = 1
    total_memory = 0


def _returning(value: Any) -> Callable[..., Any]:
    """A function that ignores its arguments and returns ``value``.

    One object per name: TorchDynamo keeps its rules by function, and refuses one that stands under two names.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return value

    return stand_in


device_synchronizations = 0
"""How often ``torch.cuda.synchronize`` was called, which on a GPU waits for all its work: transfers of other stages too."""


def _synchronize(device: Any = None) -> None:
    global device_synchronizations
    device_synchronizations += 1


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
    """Set the CPU generator's state: here it is the device's generator too."""
    torch.default_generator.set_state(state)


def wrap_set_cuda_rng_state(original: Callable[..., Any]) -> Callable[..., None]:
    """What stands in the place of Megatron's function that sets the device's generator."""
    return set_rng_state


def _seed(seed: int) -> None:
    # Not torch.manual_seed: that one calls torch.cuda.manual_seed_all, which is _seed_all.
    torch.default_generator.manual_seed(seed)


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _without_drawing(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap a function that draws from the host's generator, which here is the device's too, so that it does not advance it.

    On a GPU a new data iterator's seed leaves the generator of dropout alone; a resumed run relies on that.
    """

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        state = torch.default_generator.get_state()
        original(*args, **kwargs)
        torch.default_generator.set_state(state)

    return wrapper


def wrap_maybe_move_tensor_to_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands in the place of the function that copies the expert router's counts to the host: they are there."""

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return maybe_move_tensor_to_cpu


def wrap_set_jit_fusion_options(original: Callable[..., None]) -> Callable[..., None]:
    """What stands in the place of the warm-up of fused functions, all of which :func:`adapt_arguments` switches off."""

    @functools.wraps(original)
    def set_jit_fusion_options(tp_size: int | None = None) -> None:
        pass

    return set_jit_fusion_options


def wrap_allgather_params(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap the layer-wise optimizer's all-gather of parts of different sizes, of which gloo takes only equal ones."""

    @functools.wraps(original)
    def allgather_params(self: Any) -> None:
        self.broadcast_params()

    return allgather_params


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in) for every torch name that would need a device."""
    cuda, stream = torch.cuda, _Stream()
    constants = {
        "current_device": 0,
        "device_count": 1,
        "device": contextlib.nullcontext(),
        "stream": contextlib.nullcontext(),
        "current_stream": stream,
        "default_stream": stream,
        "get_device_properties": _DeviceProperties(),
        "get_device_capability": (0, 0),
        "get_device_name": "cpu",
        "memory_stats": _MemoryStats(),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "device_memory_used": 0,
        "set_device": None,
        "set_stream": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
    }
    table = _device_functions()
    table += [(cuda, name, _returning(value)) for name, value in constants.items()]
    table += [(cuda, "Stream", _Stream), (cuda, "Event", _Event), (cuda, "synchronize", _synchronize)]
    table += [(cuda.nvtx, name, _returning(0)) for name in ("range_push", "range_pop")]
    # Modules move in place, so unlike Tensor.cuda this one returns the module it was called on.
    table.append((torch.nn.Module, "cuda", lambda module, device=None: module))
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    table.append((iterator, "__init__", _without_drawing(iterator.__init__)))
    for owner in (cuda, cuda.random):
        table += [
            (owner, "get_rng_state", _get_rng_state),
            (owner, "set_rng_state", set_rng_state),
            (owner, "manual_seed", _seed),
            (owner, "manual_seed_all", _seed_all),
        ]
    return table


class _MemoryStats(dict[str, int]):
    """Every statistic of a memory that is not there is 0 bytes."""

    def __missing__(self, key: str) -> int:
        return 0
