"""The one place outside ``plugin/`` that touches ``torch.cuda``: time on a device, memory, and copies to the host."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any, NamedTuple

import torch

SECTIONS = 256
"""How many of each name a :class:`Stopwatch` remembers."""


class Stopwatch:
    """Sums the seconds between pairs of :meth:`start` and :meth:`stop` as the stage's device sees them.

    On a GPU the host runs ahead, so pairs of CUDA events are recorded in the current stream and added up once the device
    has passed them; only :meth:`take_s` waits for that. On a CPU the monotonic clock is enough.

    A pair of events also spans the gaps in which the device waits for the host to queue its next kernel. There are none if
    the whole section was queued before the device came to it; the time of the sections for which that was not so is summed
    apart, as ``host_bound_s``: it may be computing or not.

    ``sections`` has the seconds of the latest sections of each name, as far as :meth:`so_far_s` has got.
    """

    def __init__(self, device: torch.device) -> None:
        self.sections: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=SECTIONS))
        self._name = ""
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._started = 0.0
        self._host_bound_s = 0.0
        # With whether it was caught up with, and the name.
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event, bool, str]] = deque()
        self._open: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # started and not stopped
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, name: str = "") -> None:
        """Begin a section."""
        self._name = name
        if not self._on_gpu:
            self._started = time.perf_counter()
            return
        self.so_far_s()  # so that as many are kept as the host is ahead
        self._open = self._free.pop() if self._free else (_timing_event(), _timing_event())
        self._open[0].record()

    def stop(self) -> None:
        """End the section that :meth:`start` began."""
        if self._on_gpu:
            assert self._open is not None
            begun, ended = self._open
            ended.record()
            self._pending.append((begun, ended, begun.query(), self._name))
        else:
            seconds = time.perf_counter() - self._started
            self._seconds += seconds
            self.sections[self._name].append(seconds)

    def so_far_s(self) -> float:
        """The seconds summed since :meth:`take_s`, without waiting: on a GPU as far as it has got."""
        while self._pending and self._pending[0][1].query():
            self._add_up()
        return self._seconds

    def wait(self) -> None:
        """Wait until a GPU has come to the end of all sections."""
        while self._pending:
            self._pending[0][1].synchronize()
            self._add_up()

    @property
    def host_bound_s(self) -> float:
        """What of :meth:`so_far_s` may have been waits of the device for the host."""
        return self._host_bound_s

    def take_s(self) -> float:
        """The seconds summed since the last call, which starts again from zero. Synchronises with a GPU."""
        return self.take()[0]

    def take(self) -> tuple[float, float]:
        """:meth:`take_s`, and what of it is ``host_bound_s``, which starts again from zero too."""
        self.wait()
        taken = self._seconds, self._host_bound_s
        self._seconds = self._host_bound_s = 0.0
        return taken

    def _add_up(self) -> None:
        begun, ended, caught_up, name = self._pending.popleft()
        seconds = begun.elapsed_time(ended) / 1000
        self._seconds += seconds
        self._host_bound_s += seconds * caught_up
        self.sections[name].append(seconds)
        self._free.append((begun, ended))


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


Moment = Any
"""A moment that :class:`DeviceClock` has marked."""


class DeviceClock:
    """Marks moments as the stage's device sees them, without waiting for it.

    On a GPU a moment is a CUDA event in the current stream, whose time is known once the device has come to it; on a CPU
    it is a reading of the monotonic clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> Moment:
        """This moment."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, moment: Moment) -> bool:
        """Whether the device has come to ``moment``, and with it to all earlier ones."""
        return not self._on_gpu or bool(moment.query())

    def wait_for(self, moment: Moment) -> None:
        """Wait until the device has come to ``moment``."""
        if self._on_gpu:
            moment.synchronize()

    def seconds(self, since: Moment, until: Moment) -> float:
        """From one passed moment to a later one. On a GPU exact to a microsecond while they are seconds apart."""
        return float(since.elapsed_time(until) / 1000 if self._on_gpu else until - since)


class HostCopy:
    """A tensor on its way to the host: the copy is queued behind the device's work so far, and nobody waits.

    On a CPU it is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._done: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = host_buffer(tuple(tensor.shape), tensor.dtype, for_device=tensor.device)
            # The source needs no holding: its memory is reused in this same stream only, after the copy.
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> torch.Tensor:
        """The tensor on the host. Costs nothing where the device has been waited for since."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, for_device: torch.device) -> torch.Tensor:
    """Uninitialised memory of the host, pinned where ``for_device`` copies from and to it without waiting."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=for_device.type == "cuda")


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`memory` count from now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


class Memory(NamedTuple):
    """Bytes on a device. ``peak_allocated``: the most that this process's tensors held. ``peak_reserved``: the most that
    PyTorch has taken for them, freed blocks included that wait for a stream. ``beside``: what is in use beside PyTorch's, by
    whichever process: the context, the communicators' buffers. None on a CPU, where nobody counts.
    """

    peak_allocated: int | None = None
    peak_reserved: int | None = None
    beside: int | None = None


def memory(device: torch.device) -> Memory:
    """What is known since :func:`reset_peak_memory`."""
    if device.type != "cuda":
        return Memory()
    free, total = torch.cuda.mem_get_info(device)
    return Memory(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        total - free - torch.cuda.memory_reserved(device),
    )
