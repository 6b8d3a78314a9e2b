"""A plan: what all stages do from an empty pipeline to the next drain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from .actions import Action, Kind
from .records import record_lag, with_records
from .schedules import IsDrain, max_drift, max_in_flight, never, one_f_one_b_flush, paci, with_transfers
from .validate import PlanError, validate


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of every stage, transfers and records included, decided by counting from an empty pipeline.

    Micro-batches count from 0 and updates from 1 since the plan began. ``schedule`` is "paci", or "1f1b" for 1F1B-flush,
    which drains at every update. For ``slack`` see :func:`~.schedules.max_in_flight`.
    ``gradients_ahead`` is for transfers that leave the device alone while they are pending.
    """

    schedule: str
    num_stages: int
    microbatches_per_update: int
    slack: tuple[int, ...] = ()
    is_drain: IsDrain = never
    gradients_ahead: bool = False

    def __post_init__(self) -> None:
        links = self.num_stages - 1
        if len(self.slack) not in (0, links):
            raise PlanError(f"slack of {len(self.slack)} links for {self.num_stages} stages: give {links} numbers, or none")

    @property
    def record_lag(self) -> int:
        """After how many updates every stage knows the sums over all stages, unless a drain comes first."""
        return record_lag(self.num_stages, self.microbatches_per_update, self.slack)

    def max_in_flight(self, stage_index: int) -> int:
        """The most micro-batches that are forwarded and not yet backwarded at a stage."""
        return max_in_flight(stage_index, self.num_stages, self.slack)

    def max_drift(self, stage_index: int) -> int:
        """The most updates between a micro-batch's forward and its backward at a stage."""
        return max_drift(stage_index, self.num_stages, self.microbatches_per_update, self.slack)

    def actions(self, stage_index: int) -> Iterator[Action]:
        """What a stage does, in order, without end."""
        n, a, slack = self.num_stages, self.microbatches_per_update, self.slack
        if self.schedule == "paci":
            computed, is_drain = paci(stage_index, n, a, self.is_drain, slack), self.is_drain
        else:
            computed, is_drain = one_f_one_b_flush(stage_index, n, a), lambda update: True
        transferred = with_transfers(computed, stage_index, n, a, is_drain, slack, self.gradients_ahead)
        return with_records(transferred, n, a, is_drain, slack)

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
        validate(plans, self.microbatches_per_update, self.slack, drains, resident)
