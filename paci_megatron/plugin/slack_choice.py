"""Which slack the links have in a run: as given, as an earlier run chose it, or chosen at drains from what was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch.distributed as dist

from paci_megatron.config import PaciConfig
from paci_megatron.runtime.link_times import LinkTimes
from paci_megatron.runtime.links import Transport
from paci_megatron.runtime.meters import ActionTimes, StageMeter
from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.slack import cheapest_slack, paci_microbatches_per_s

Slack = tuple[int, ...]
MOST_JITTER = 0.9
"""Beyond it times are not evenly distributed, and the simulator could draw none at all."""


class SlackChoices:
    """The slack of the plans of a run, the same on every rank. Iterations count from 1."""

    def __init__(self, config: PaciConfig, iteration: int, saved: Sequence[tuple[int, Slack]] | None) -> None:
        """The run goes on after ``iteration``; ``saved`` are the choices in its checkpoint."""
        self._extra = config.extra
        self.choices = list(config.extra.choices)
        if config.extra.is_auto:
            made = [(after, tuple(slack)) for after, slack in saved or [] if 0 < after <= iteration]
            if all(len(slack) == config.num_stages - 1 and sum(slack) <= config.extra.most for _, slack in made):
                self.choices += made
        self._measured_after = iteration

    def after(self, iteration: int) -> Slack:
        """Of the plan that begins after ``iteration``."""
        return next((slack for after, slack in reversed(self.choices) if after <= iteration), self.choices[0][1])

    def begins_after(self, iteration: int) -> bool:
        """Whether an earlier run chose after ``iteration``."""
        return iteration > 0 and any(after == iteration for after, _ in self.choices)

    def drains(self, iteration: int, record_lag: int) -> list[int]:
        """After which iterations the pipeline must drain for it, of a run that goes on after ``iteration``."""
        if self._extra.is_auto and len(self.choices) == 1:
            return [iteration + self._extra.measured_updates(record_lag)]
        return [after for after, _ in self.choices[1:]]

    def is_due(self, iteration: int, plan: Plan) -> bool:
        """Whether a choice is to be made after ``iteration``, where ``plan`` ends."""
        return self._extra.is_auto and iteration - self._measured_after >= self._extra.measured_updates(plan.record_lag)

    def choose(self, iteration: int, plan: Plan, meters: Sequence[StageMeter], transport: Transport) -> dict[str, Any]:
        """Choose for the plans after ``iteration``; what was measured and foretold. Collective, of an empty pipeline.

        Rank 0 chooses. Without a reason to change what there is, it stays.
        """
        began_s, a, ahead = time.monotonic(), plan.microbatches_per_update, plan.gradients_ahead
        links = transport.link_times()
        measured = gather([measure(meter, links.get(meter.stage_index, LinkTimes())) for meter in meters])
        costs = costs_of(measured)
        each_bytes = max(each.bytes_per_microbatch or 0.0 for each in measured if each.stage_index == 0)
        decided: list[Any] = [None]
        if dist.get_rank() == 0:
            slack, before = cheapest_slack(a, costs, self._most(plan.num_stages, each_bytes), ahead), self.after(iteration)
            foretold = [paci_microbatches_per_s(a, costs, each, ahead) for each in (before, slack)]
            if sum(before) <= sum(slack) and foretold[1] < 1.01 * foretold[0]:
                slack, foretold = before, foretold[:1] * 2
            decided = [(slack, foretold)]
        dist.broadcast_object_list(decided, src=0)
        slack, (before_per_s, per_s) = decided[0]
        self.choices.append((iteration, slack))
        self._measured_after = iteration
        return {
            "gain": per_s / before_per_s,
            "forward_ms": [1000 * stage.forward_s for stage in costs.stages],
            "backward_ms": [1000 * stage.backward_s for stage in costs.stages],
            "update_ms": [1000 * stage.update_s for stage in costs.stages],
            "latency_ms": [1000 * each for each in costs.latencies_s],
            "message_ms": [1000 * each for each in costs.links_s],
            "jitter": costs.jitter,
            "bytes_per_microbatch": each_bytes,
            "choosing_s": time.monotonic() - began_s,
        }

    def _most(self, num_stages: int, each_bytes: float) -> int:
        """How many micro-batches the first stage may have more than it needs, if one of them takes ``each_bytes``."""
        if self._extra.most_bytes is None:
            return self._extra.most
        fitting = int(self._extra.most_bytes / each_bytes) if each_bytes else 0
        return min(self._extra.most, max(0, fitting - num_stages))


class Measured(NamedTuple):
    """Of one stage, and of the link that follows it."""

    stage_index: int
    forward: ActionTimes
    backward: ActionTimes
    update_s: float
    link: LinkTimes
    bytes_per_microbatch: float | None = None  # that are kept for its backward, where they were counted


def measure(meter: StageMeter, link: LinkTimes) -> Measured:
    """What the stage's meter has, beside its link's times."""
    update_s = sum(meter.action_times(kind).median_s for kind in (Kind.REPORT, Kind.UPDATE))
    forward, backward = meter.action_times(Kind.FORWARD), meter.action_times(Kind.BACKWARD)
    return Measured(meter.stage_index, forward, backward, update_s, link, meter.bytes_per_microbatch)


def gather(mine: Sequence[Measured]) -> list[Measured]:
    """What this rank and all others have measured. Collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(mine))
    return [each for theirs in gathered for each in theirs]


def costs_of(measured: Sequence[Measured]) -> Costs:
    """For the simulator: of several replicas the slowest of each. A message's time stands for its size: only their ratio
    counts.
    """
    by_stage = [
        [each for each in measured if each.stage_index == stage]
        for stage in range(1 + max(each.stage_index for each in measured))
    ]
    stages = tuple(
        StageCosts(
            max(each.forward.median_s for each in replicas),
            max(each.backward.median_s for each in replicas),
            update_s=max(each.update_s for each in replicas),
        )
        for replicas in by_stage
    )
    links = by_stage[:-1]
    message_s = [max(each.link.message_s for each in replicas) for replicas in links]
    jitter = fmean(times.spread for each in measured for times in (each.forward, each.backward))
    return Costs(
        stages,
        latency_s=tuple(max(each.link.latency_s for each in replicas) for replicas in links),
        message_bytes=1.0,
        bandwidth_bytes_per_s=tuple(1 / each if each else float("inf") for each in message_s),
        handshakes=True,
        jitter=min(jitter, MOST_JITTER),
    )


def choice_line(iteration: int, plan: Plan, found: dict[str, Any]) -> str:
    """For the log; ``plan`` is the first with the choice. ``found`` is empty where an earlier run chose."""

    def row(name: str) -> str:
        return " ".join(f"{value:.3g}" for value in found[name])

    by_link = ",".join(map(str, plan.slack))
    each = f" of {found['bytes_per_microbatch'] / 1e6:.3g} MB" if found.get("bytes_per_microbatch") else ""
    begins = (
        f"in flight from iteration {iteration + 1} on: {by_link} more by link, {plan.max_in_flight(0)} micro-batches{each} "
        f"at the first stage, drift of at most {plan.max_drift(0)} updates"
    )
    if not found:
        return f"{begins}, as the run with auto chose"
    times = " ".join(f"{f:.3g}:{b:.3g}" for f, b in zip(found["forward_ms"], found["backward_ms"], strict=True))
    return (
        f"{begins}; {found['gain'] - 1:.1%} faster is foretold. Measured, ms: stages {times}, "
        f"updates {row('update_ms')}, latency {row('latency_ms')}, "
        f"an activation {row('message_ms')} more; times vary by {found['jitter']:.0%}. Chosen in {found['choosing_s']:.1f} s"
    )
