"""Writes down where a stage's time goes: every action of its plan, with computing, waiting and transfers apart.

A file a stage, one JSON object a line: a ``plan`` where a plan begins, an ``action`` for each action, ``layers`` for each
update, and a ``drain`` where the plan ends. trace_file.py reads them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from paci_megatron.runtime.device import DeviceClock, Moment
from paci_megatron.schedule import Action, Kind
from paci_megatron.schedule.actions import TRANSFER_KINDS

from .metrics_file import MetricsFile
from .trace_file import EMBEDDING, INPUT, LOSS, OUTPUT, layer_part, trace_path

_BATCH = 128  # actions that are written together


@dataclass(slots=True)
class _Performed:
    """An action, and the moments in it. ``parts`` are names of the model's parts, each with the moment it was done."""

    action: Action
    iteration: int
    begin: Moment
    received: Moment | None = None
    end: Moment | None = None
    parts: list[tuple[str, Moment]] = field(default_factory=list)


class StageTrace:
    """Listens to one stage's executor (a :class:`~paci_megatron.runtime.executor.Listener`), and to its model's layers.

    Moments are only marked when they come. They are read and written when a batch of actions has passed on the device, and
    at drains, where the device is waited for.
    """

    def __init__(self, folder: str | Path, device: torch.device, stage_index: int, num_stages: int, **run: Any) -> None:
        """Appends to the stage's file in ``folder``, which is made. ``run`` is what else the event of a plan says."""
        self._stage_index = stage_index
        self._num_stages = num_stages
        self._run = run
        self._clock = DeviceClock(device)
        self._file = MetricsFile(trace_path(folder, stage_index))
        self._head = EMBEDDING if stage_index == 0 else INPUT
        self._tail = LOSS if stage_index == num_stages - 1 else OUTPUT
        self._has_layers = False
        self._at: _Performed | None = None
        self._pending: list[_Performed] = []
        self._iteration = 0
        self._read: tuple[Moment, float] | None = None  # the last moment that was read, and its seconds since the plan began
        self._layers = _LayerSums()

    def begin_plan(self, microbatches_per_update: int, iteration: int) -> None:
        """A plan starts after ``iteration``, with an empty pipeline. Times count from here."""
        begin = self._clock.now()
        self._clock.wait_for(begin)
        self._read = (begin, 0.0)
        self._iteration = iteration + 1
        header = {
            "event": "plan",
            "stage": self._stage_index,
            "num_stages": self._num_stages,
            **self._run,
            "microbatches_per_update": microbatches_per_update,
            "after_iteration": iteration,
            "time_s": time.time(),
        }
        self._file.write_all([header])

    def end_plan(self) -> None:
        """The pipeline is empty: write down all there is."""
        if self._pending:
            self._clock.wait_for(self._pending[-1].end)
            self._write_down(len(self._pending))
        self._file.write("drain", iteration=self._iteration - 1)

    def begin(self, action: Action) -> None:
        """See :class:`~paci_megatron.runtime.executor.Listener`."""
        self._at = _Performed(action, self._iteration, self._clock.now())

    def received(self) -> None:
        """See :class:`~paci_megatron.runtime.executor.Listener`."""
        assert self._at is not None
        self._at.received = self._clock.now()

    def end(self) -> None:
        """See :class:`~paci_megatron.runtime.executor.Listener`."""
        assert self._at is not None
        self._at.end = self._clock.now()
        self._pending.append(self._at)
        self._iteration += self._at.action.kind is Kind.UPDATE
        self._at = None
        if len(self._pending) % _BATCH == 0:
            # The newest may not have passed on a GPU, which the host runs ahead of.
            while len(self._pending) > _BATCH and self._clock.has_passed(self._pending[_BATCH - 1].end):
                self._write_down(_BATCH)

    @contextmanager
    def performing(self, action: Action) -> Iterator[None]:
        """All of ``action`` happens inside, and waits for nothing."""
        self.begin(action)
        try:
            yield
        finally:
            self.end()

    def listen_to_layers(self, layers: Sequence[torch.nn.Module]) -> None:
        """Measure each of the stage's transformer layers, from now on. They know their numbers in the whole model."""
        for index, layer in enumerate(layers):
            number: Any = layer.layer_number
            part = layer_part(number)
            layer.register_forward_pre_hook(self._layer_begins(part, is_first=index == 0), with_kwargs=True)
            layer.register_forward_hook(self._layer_ends(part, is_last=index == len(layers) - 1))
        self._has_layers = bool(layers)

    def _layer_begins(self, part: str, is_first: bool) -> Callable[..., None]:
        def hook(layer: Any, positional: Any, named: Any) -> None:
            if is_first:
                self._part_done(self._head)
            hidden_states = named["hidden_states"] if "hidden_states" in named else positional[0]
            self._when_gradient_is_known(hidden_states, part)

        return hook

    def _layer_ends(self, part: str, is_last: bool) -> Callable[..., None]:
        def hook(layer: Any, positional: Any, output: Any) -> None:
            self._part_done(part)
            if is_last:
                self._when_gradient_is_known(output[0] if isinstance(output, tuple) else output, self._tail)

        return hook

    def _when_gradient_is_known(self, tensor: torch.Tensor, part: str) -> None:
        """When the backward has come to ``tensor``, the backward of ``part``, for which it was the input, is done."""
        if self._at is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._part_done(part))

    def _part_done(self, part: str) -> None:
        if self._at is not None:  # in an evaluation there is no action
            self._at.parts.append((part, self._clock.now()))

    def _write_down(self, count: int) -> None:
        """Read the moments of the ``count`` oldest actions and append them to the file."""
        events: list[dict[str, Any]] = []
        for performed in self._pending[:count]:
            events.append(self._event(performed))
            self._sum_parts(performed)
            if performed.action.kind is Kind.UPDATE:
                events.append({"event": "layers", "iteration": performed.iteration, **self._layers.take()})
        del self._pending[:count]
        self._file.write_all(events)

    def _event(self, performed: _Performed) -> dict[str, Any]:
        assert self._read is not None
        seconds, (last, last_s) = self._clock.seconds, self._read
        # From moment to moment: a GPU's clock becomes coarse over long times.
        start_s = last_s + seconds(last, performed.begin)
        waiting_s = 0.0 if performed.received is None else seconds(performed.begin, performed.received)
        rest_s = seconds(performed.begin if performed.received is None else performed.received, performed.end)
        self._read = (performed.end, start_s + waiting_s + rest_s)
        rest = "transfer_s" if performed.action.kind in TRANSFER_KINDS else "compute_s"
        return {
            "event": "action",
            "iteration": performed.iteration,
            "action": str(performed.action),
            "start_s": round(start_s, 7),
            "waiting_s": round(waiting_s, 7),
            rest: round(rest_s, 7),
        }

    def _sum_parts(self, performed: _Performed) -> None:
        """The first interval of a forward is what comes before the layers, the last what comes after; of a backward, which
        with recomputation begins with a forward, the reverse.
        """
        kind = performed.action.kind
        if kind not in (Kind.FORWARD, Kind.BACKWARD):
            return
        first, last = (self._head, self._tail) if kind is Kind.FORWARD else (self._tail, self._head)
        if not self._has_layers:
            first = last = EMBEDDING if self._head == EMBEDDING else self._tail
        names = [part for part, _ in performed.parts]
        names[:1] = [first] if names else []
        begin = performed.begin if performed.received is None else performed.received
        moments = [begin, *(moment for _, moment in performed.parts), performed.end]
        for part, (since, until) in zip([*names, last], pairwise(moments), strict=True):
            self._layers.add(kind, part, self._clock.seconds(since, until))
        self._layers.count(kind)


class _LayerSums:
    """Seconds by part of the model, of the forwards and of the backwards of an update's time."""

    def __init__(self) -> None:
        self._seconds: dict[Kind, defaultdict[str, float]] = {}
        self._counts: dict[Kind, int] = {}
        self.take()

    def add(self, kind: Kind, part: str, seconds: float) -> None:
        self._seconds[kind][part] += seconds

    def count(self, kind: Kind) -> None:
        self._counts[kind] += 1

    def take(self) -> dict[str, Any]:
        """The sums and counts; starts again from zero."""
        taken: dict[str, Any] = {}
        for kind, name in ((Kind.FORWARD, "forward"), (Kind.BACKWARD, "backward")):
            taken[f"{name}s"] = self._counts.get(kind, 0)
            taken[f"{name}_s"] = {part: round(sum_s, 7) for part, sum_s in self._seconds.get(kind, {}).items()}
            self._counts[kind], self._seconds[kind] = 0, defaultdict(float)
        return taken
