"""A plan: what all stages do from an empty pipeline to the next drain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import takewhile

from .actions import Action, Kind, shared_action
from .records import record_lag, with_records
from .schedules import IsDrain, max_drift, max_in_flight, never, one_f_one_b_flush, paci, with_transfers
from .validate import PlanError, validate
from .vee import Fold, paci_v
from .vee import with_messages as with_messages_of_a_v


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of every stage, transfers and records included, decided by counting from an empty pipeline.

    Micro-batches count from 0 and updates from 1 since the plan began. ``schedule`` is "paci", or "1f1b" for 1F1B-flush,
    which drains at every update. For ``slack`` see :func:`~.schedules.max_in_flight`.
    ``gradients_ahead`` is for transfers that leave the device alone while they are pending. Where processes hold two stages
    each, ``folded`` has their order, and the slack is its own.
    """

    schedule: str
    num_stages: int
    microbatches_per_update: int
    slack: tuple[int, ...] = ()
    is_drain: IsDrain = never
    gradients_ahead: bool = False
    folded: Fold | None = None

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

    def mean_drift(self, stage_index: int) -> float:
        """The mean number of updates between a micro-batch's forward and its backward at a stage, while none drains."""
        return (self.max_in_flight(stage_index) - 1) / self.microbatches_per_update

    def actions(self, stage_index: int) -> Iterator[Action]:
        """What a stage does, in order, without end."""
        if self.folded is not None:
            process, chunk = self.folded.place(stage_index)
            return (shared_action(each.kind, each.index) for each in self.process_actions(process) if each.chunk == chunk)
        n, a, slack = self.num_stages, self.microbatches_per_update, self.slack
        if self.schedule != "1f1b":
            computed, is_drain = paci(stage_index, n, a, self.is_drain, slack), self.is_drain
        else:
            computed, is_drain = one_f_one_b_flush(stage_index, n, a), lambda update: True
        transferred = with_transfers(computed, stage_index, n, a, is_drain, slack, self.gradients_ahead)
        return with_records(transferred, n, a, is_drain, slack)

    def process_actions(self, process: int) -> Iterator[Action]:
        """What a process of a V does with its two stages, in order, without end."""
        folded, a, is_drain = self.folded, self.microbatches_per_update, self.is_drain
        assert folded is not None
        return with_messages_of_a_v(paci_v(process, folded, a, is_drain), process, folded, a, is_drain)

    def most_received(self, stage_index: int, kind: Kind) -> int:
        """The most tensors that are posted by receives of this kind, or received and not yet through their backward."""
        steady = Action(Kind.BACKWARD, 2 * self.max_in_flight(0))
        held = most = 0
        for action in takewhile(lambda action: action != steady, replace(self, is_drain=never).actions(stage_index)):
            held += (action.kind is kind) - (action.kind is Kind.BACKWARD)
            most = max(most, held)
        return most

    def check(self) -> None:
        """``PlanError`` unless this plan keeps every rule of :func:`~.validate.validate`.

        Looked at up to its first drain, and no further than until every stage has been in steady state for a while, with a
        drain put there: what follows repeats itself.
        """
        longest = 2 * self.record_lag + 1
        last = next((update for update in range(1, longest) if self.is_drain(update)), longest)
        cut = replace(self, is_drain=lambda update: update == last or self.is_drain(update))
        end = Action(Kind.UPDATE, last)
        if self.folded is not None:
            streams = [cut.process_actions(process) for process in range(len(self.folded.begins))]
        else:
            streams = [cut.actions(stage) for stage in range(self.num_stages)]
        plans = [[*takewhile(lambda action: action != end, stream), end] for stream in streams]
        drains = range(1, last + 1) if self.schedule == "1f1b" else (last,)
        resident = not self.gradients_ahead
        validate(plans, self.microbatches_per_update, self.slack, drains, resident)
