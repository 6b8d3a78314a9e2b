"""When each evaluation is reached where stages share a device: computed by the simulator from measured stage times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from paci_megatron.schedule.schedules import one_f_one_b_flush, paci
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import simulate

from .arms import Arm
from .records import Event

FORWARD_SHARE = 1 / 3


def seconds_per_microbatch(runs: Iterable[tuple[Arm, Sequence[Event]]]) -> list[float] | None:
    """Each stage's computing seconds for one micro-batch, updates included: the median over all stretches between drains.

    The median keeps out what other programs on the machine did meanwhile. None if there is no stretch.
    """
    by_stage: dict[int, list[float]] = {}
    for arm, events in runs:
        for event in events:
            for stage in event["stages"] if event["event"] == "drain" else ():
                busy_s = (1 - stage["bubble_fraction"]) * stage["wall_s"]
                microbatches = stage["updates"] * arm.microbatches_per_update
                by_stage.setdefault(stage["stage_index"], []).append(busy_s / microbatches)
    return [median(by_stage[stage]) for stage in sorted(by_stage)] or None


def costs(stage_seconds: Sequence[float]) -> Costs:
    """Costs of stages that take so long for a micro-batch, a third of it forward; transfers are free."""
    return Costs(tuple(StageCosts(forward_s=s * FORWARD_SHARE, backward_s=s * (1 - FORWARD_SHARE)) for s in stage_seconds))


def period_seconds(arm: Arm, num_updates: int, stage_seconds: Sequence[float]) -> float:
    """The computed time of so many updates from an empty pipeline to an empty pipeline, as between two evaluations."""
    num_stages, a = len(stage_seconds), arm.microbatches_per_update
    if arm.is_flush:
        plans = [one_f_one_b_flush(stage, num_stages, a) for stage in range(num_stages)]
    else:
        plans = [paci(stage, num_stages, a, lambda update: update == num_updates) for stage in range(num_stages)]
    return simulate(plans, costs(stage_seconds), last_update=num_updates).makespan_s


def tokens_per_second(arm: Arm, seq_length: int, stage_seconds: Sequence[float]) -> float:
    """The computed speed in steady state, between drains."""
    num_stages, a = len(stage_seconds), arm.microbatches_per_update
    schedule = one_f_one_b_flush if arm.is_flush else paci
    # After a few updates every schedule here repeats itself; 2N micro-batches are more than the fill takes.
    first = -(-2 * num_stages // a)
    simulation = simulate(
        [schedule(stage, num_stages, a) for stage in range(num_stages)], costs(stage_seconds), last_update=4 * first
    )
    return simulation.microbatches_per_s(after_update=first) * arm.micro_batch_size * seq_length


def in_flight(arm: Arm, num_stages: int) -> int:
    """The most micro-batches that the first stage holds activations of."""
    return min(arm.microbatches_per_update, num_stages) if arm.is_flush else num_stages
