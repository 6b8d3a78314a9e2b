"""What a pipeline's stages and links take; from text, and in text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from paci_megatron.schedule.actions import Kind
from paci_megatron.usage import UsageError, require


@dataclass(frozen=True)
class StageCosts:
    """Seconds that one stage takes for a micro-batch's forward and whole backward (all its chunks together) and an update.

    ``weight_s`` is the part of the backward that computes weight gradients, half of it if None; only the zero-bubble
    schedules run it apart.
    """

    forward_s: float
    backward_s: float
    weight_s: float | None = None
    update_s: float = 0

    @property
    def weight_gradient_s(self) -> float:
        """``weight_s``, whether given or not."""
        return self.backward_s / 2 if self.weight_s is None else self.weight_s

    def seconds(self, kind: Kind) -> float:
        """What an action of this kind takes."""
        return {
            Kind.FORWARD: self.forward_s,
            Kind.BACKWARD: self.backward_s,
            Kind.INPUT_GRADIENT: self.backward_s - self.weight_gradient_s,
            Kind.WEIGHT_GRADIENT: self.weight_gradient_s,
            Kind.UPDATE: self.update_s,
        }[kind]


@dataclass(frozen=True)
class Costs:
    """What everything takes. Transfers overlap compute: a message occupies its link, one for each direction between two
    neighbours, for ``message_bytes / bandwidth_bytes_per_s`` and arrives ``latency_s`` later. Both are of every link, or a
    number for each, from the first stage's on.

    With ``handshakes`` a message leaves only when its receive is posted and the sender knows of it, which takes a latency
    too: so gloo performs transfers, and so the schedules that can be run here are simulated, with their own receives and
    waits.

    With ``jitter`` J every action takes between 1-J and 1+J of its time, evenly distributed; the same ``seed`` gives the
    same times.
    """

    stages: tuple[StageCosts, ...]
    latency_s: float | tuple[float, ...] = 0
    message_bytes: float = 0
    bandwidth_bytes_per_s: float | tuple[float, ...] = math.inf
    handshakes: bool = False
    jitter: float = 0
    seed: int = 0

    @cached_property
    def latencies_s(self) -> tuple[float, ...]:
        """Of each link, from the first stage's on."""
        return self._by_link(self.latency_s)

    @cached_property
    def links_s(self) -> tuple[float, ...]:
        """How long a message occupies each link."""
        return tuple(
            self.message_bytes / rate if self.message_bytes else 0 for rate in self._by_link(self.bandwidth_bytes_per_s)
        )

    def _by_link(self, value: float | tuple[float, ...]) -> tuple[float, ...]:
        links = len(self.stages) - 1
        if not isinstance(value, tuple):
            return (value,) * links
        if len(value) != links:
            raise ValueError(f"{len(value)} numbers for {links} links between {len(self.stages)} stages: give one a link")
        return value


def parse_stage_ms(text: str, update_ms: float) -> StageCosts:
    """The costs of one stage from ``FORWARD:BACKWARD[:WEIGHT]``."""
    try:
        forward_s, backward_s, *rest = (float(part) / 1000 for part in text.split(":"))
        (weight_s,) = rest or [backward_s / 2]
    except ValueError:
        raise UsageError(f"--stage-ms {text}: expected FORWARD:BACKWARD or FORWARD:BACKWARD:WEIGHT, like 100:200") from None
    positive = 0 < forward_s < math.inf and 0 < backward_s < math.inf
    require(positive, f"--stage-ms {text}: a forward and a backward take time; give milliseconds above 0")
    message = f"--stage-ms {text}: WEIGHT is a part of BACKWARD; give 0 to {backward_s * 1000:g}, or leave it out"
    require(0 <= weight_s <= backward_s, message)
    return StageCosts(forward_s, backward_s, weight_s, update_ms / 1000)


def describe(costs: Costs) -> str:
    """The costs in one line."""

    def times(stage: StageCosts) -> str:
        ms = (stage.forward_s, stage.backward_s, stage.weight_gradient_s)
        return ":".join(f"{seconds * 1000:.4g}" for seconds in ms)

    stages = costs.stages
    each = "all " + times(stages[0]) if len(set(stages)) == 1 else " ".join(times(stage) for stage in stages)
    parts = [f"stages (forward:backward:weight gradients, ms): {each}"]
    for what, by_place in (
        ("update", (stages[0].update_s,)),
        ("transfer latency", costs.latencies_s),
        ("transfer on its link", costs.links_s),
    ):
        shown = by_place if len(set(by_place)) > 1 else by_place[:1]
        if any(shown):
            parts.append(f"{what} {' '.join(f'{1000 * seconds:.4g}' for seconds in shown)} ms")
    return ", ".join(parts + ([f"jitter {costs.jitter:.0%}"] if costs.jitter else []))
