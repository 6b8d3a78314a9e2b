"""A plan: what all stages do from an empty pipeline to the next drain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from .actions import Action, Kind
from .records import record_lag, with_records
from .schedules import IsDrain, max_drift, max_in_flight, never, one_f_one_b_flush, paci, with_transfers
from .validate import validate


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of every stage, transfers and records included, decided by counting from an empty pipeline.

    Micro-batches count from 0 and updates from 1 since the plan began. ``schedule`` is "paci", or "1f1b" for 1F1B-flush,
    which drains at every update. ``gradients_ahead`` is for transfers that leave the device alone while they are pending.
    """

    schedule: str
    num_stages: int
    microbatches_per_update: int
    extra_in_flight: int = 0
    is_drain: IsDrain = never
    gradients_ahead: bool = False

    @property
    def record_lag(self) -> int:
        """After how many updates every stage knows the sums over all stages, unless a drain comes first."""
        return record_lag(self.num_stages, self.microbatches_per_update, self.extra_in_flight)

    def max_in_flight(self, stage_index: int) -> int:
        """The most micro-batches that are forwarded and not yet backwarded at a stage."""
        return max_in_flight(stage_index, self.num_stages, self.extra_in_flight)

    def max_drift(self, stage_index: int) -> int:
        """The most updates between a micro-batch's forward and its backward at a stage."""
        return max_drift(stage_index, self.num_stages, self.microbatches_per_update, self.extra_in_flight)

    def actions(self, stage_index: int) -> Iterator[Action]:
        """What a stage does, in order, without end."""
        n, a, extra = self.num_stages, self.microbatches_per_update, self.extra_in_flight
        if self.schedule == "paci":
            computed, is_drain = paci(stage_index, n, a, self.is_drain, extra), self.is_drain
        else:
            computed, is_drain = one_f_one_b_flush(stage_index, n, a), lambda update: True
        transferred = with_transfers(computed, stage_index, n, a, is_drain, extra, self.gradients_ahead)
        return with_records(transferred, n, a, is_drain, extra)

    def check(self) -> None:
        """``PlanError`` unless this plan keeps every rule of :func:`~.validate.validate`.

        Looked at up to its first drain, and no further than until every stage has been in steady state for a while, with a
        drain put there: what follows repeats itself.
        """
        longest = 2 * self.record_lag + 1
        last = next((update for update in range(1, longest) if self.is_drain(update)), longest)
        cut = replace(self, is_drain=lambda update: update == last or self.is_drain(update))
        end = Action(Kind.UPDATE, last)
        stages = range(self.num_stages)
        plans = [[*takewhile(lambda action: action != end, cut.actions(stage)), end] for stage in stages]
        drains = range(1, last + 1) if self.schedule != "paci" else (last,)
        resident = not self.gradients_ahead
        validate(plans, self.microbatches_per_update, self.extra_in_flight, drains, resident)
