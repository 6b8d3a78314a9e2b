"""What all stages know of an update, without a collective: sums that travel beside the micro-batches.

See ``schedule/records.py`` for when; this is what: the squared gradient norm, the window's tokens and loss, and whether to
stop. From them follow the clipping and the skipping of updates, the same on every run whatever the timing. Figures for
the log travel along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from .loss_scale import LossScale

_MARGIN = 1e-6  # added to the norm when clipping, as Megatron does (core/optimizer/clip_grads.py)


def _known(choose: Callable[[float, float], float], one: float, other: float) -> float:
    """What is chosen of the two, or the one that is not NaN."""
    return other if math.isnan(one) else one if math.isnan(other) else choose(one, other)


class Record(NamedTuple):
    """Sums over a stage and the later ones, or in a total over all stages, for one window. Numbers only: it is sent.

    ``exits`` is how many ask to drain soon, so that Megatron can stop. The loss is the last stage's, and 0 unless watched.
    Bubbles are those of the busiest and the idlest of these stages in the last complete log interval, NaN as long as there
    is none. ``weight_change`` is the most by which any stage's weights have changed over a drift in this window, relative to
    them. ``host_bound`` is the most of any stage's time in which its GPU may have waited for its host while it counted as
    computing.
    """

    squared_norm: float = 0.0
    num_tokens: float = 0.0
    exits: float = 0.0
    loss: float = 0.0
    least_bubble: float = math.nan
    most_bubble: float = math.nan
    max_drift: float = 0.0
    weight_change: float = 0.0
    host_bound: float = 0.0

    def plus(self, later: Record) -> Record:
        """The sums with ``later``'s."""
        return Record(
            self.squared_norm + later.squared_norm,
            self.num_tokens + later.num_tokens,
            self.exits + later.exits,
            self.loss + later.loss,
            _known(min, self.least_bubble, later.least_bubble),
            _known(max, self.most_bubble, later.most_bubble),
            max(self.max_drift, later.max_drift),
            max(self.weight_change, later.weight_change),
            max(self.host_bound, later.host_bound),
        )

    def to_save(self) -> tuple[float, ...]:
        """What a checkpoint keeps, as arguments of a new record: nothing that depends on timing."""
        return self[:2]

    @property
    def is_finite(self) -> bool:
        """Whether every gradient in the sum is a number."""
        return math.isfinite(self.squared_norm)

    @property
    def norm(self) -> float:
        """The gradient norm."""
        return math.sqrt(self.squared_norm) if self.is_finite else self.squared_norm


class RecordLink(Protocol):
    """A stage's records to and from its neighbours."""

    def post_receive_report(self) -> None:
        """Get ready for one more report; returns at once."""

    def receive_report(self) -> Record:
        """The next stage's report; an empty one on the last stage."""

    def send_report(self, record: Record) -> None:
        """To the previous stage; nothing on the first."""

    def post_receive_total(self) -> None:
        """Get ready for one more total; returns at once."""

    def receive_total(self) -> Record | None:
        """The total from the previous stage; None on the first."""

    def send_total(self, record: Record) -> None:
        """To the next stage; nothing on the last."""


@dataclass(frozen=True, slots=True)
class Clipping:
    """How gradients are clipped: ``max_norm`` 0 is not at all."""

    mode: str = "none"
    max_norm: float = 0.0

    def coefficient(self, norm: float) -> float:
        """What gradients of this norm are multiplied by, at most 1."""
        return min(self.max_norm / (norm + _MARGIN), 1.0) if self.mode != "none" else 1.0


class Control:
    """One stage's knowledge of updates: reports of itself and later stages, and totals of all, by update.

    Updates count from 1 since the plan began. ``before`` is the total of the last update before the plan, at a drain.
    """

    def __init__(
        self,
        link: RecordLink,
        clipping: Clipping,
        lag: int,
        before: Record = Record(),  # noqa: B008 - immutable
        loss_scale: LossScale | None = None,
        agree: Callable[[Record], Record] = lambda record: record,
        on_total: Callable[[int, Record], None] = lambda update, total: None,
    ) -> None:
        """``agree`` makes one of the records of stage 0's ranks; ``on_total`` is called with each total, in order."""
        self.clipping = clipping
        self.lag = lag
        self._link = link
        self._agree = agree
        self._on_total = on_total
        self._before = before
        self._loss_scale = loss_scale if loss_scale is not None else LossScale(None)  # a scale of 1
        self._own: dict[int, Record] = {}
        self._reports: dict[int, Record] = {}  # with the later stages'
        self._totals: dict[int, Record] = {}
        self._last_total = 0

    def report(self, update: int, own: Record, later: Record) -> None:
        """Add ``own`` to ``later`` and pass it on."""
        self._own[update] = own
        report = self._reports[update] = own.plus(later)
        self._link.send_report(report)
        for kept in (self._own, self._reports, self._totals):
            kept.pop(update - 2 * self.lag - 1, None)

    def pass_total(self, update: int) -> None:
        """Take the total of ``update`` from the previous stage, and pass it on."""
        received = self._link.receive_total()
        total = self._agree(self._reports[update]) if received is None else received
        self._link.send_total(total)
        self._totals[update] = total
        self._last_total = update
        self._loss_scale.hear(update, total.is_finite)
        self._on_total(update, total)

    def is_drained(self, update: int) -> bool:
        """Whether ``update``'s own total is here before it is applied, on every stage alike: only at a drain."""
        return self._last_total == update

    @property
    def last_total(self) -> Record:
        """The latest total that is known here."""
        return self.total(self._last_total)

    def total(self, update: int) -> Record:
        """The total of ``update``; of the last one before the plan for those that the plan does not have."""
        return self._totals[update] if update >= 1 else self._before

    def may_apply(self, update: int) -> bool:
        """Whether all gradients that this stage can know of are finite: at a drain all, otherwise its own and later
        stages'.
        """
        known = self._totals[update] if self.is_drained(update) else self._reports[update]
        return known.is_finite

    def coefficient(self, update: int) -> float:
        """What this stage's gradients of ``update`` are multiplied by.

        Clipping by stage goes by the stage's own norm. Global clipping goes by the exact global norm at a drain, and
        otherwise by the larger of what is known of this window's norm (this and the later stages') and the global norm of
        ``lag`` updates ago.
        """
        if self.clipping.mode == "stage":
            return self.clipping.coefficient(self._own[update].norm)
        if self.is_drained(update):
            return self.clipping.coefficient(self._totals[update].norm)
        earlier = self.total(update - self.lag)
        return self.clipping.coefficient(max(self._reports[update].norm, earlier.norm if earlier.is_finite else 0.0))

    def tied_coefficient(self, window: int, update: int) -> float:
        """What the tied embedding's gradient of ``window`` is multiplied by, on both stages that hold it, to be applied in
        ``update`` as one of its own.
        """
        rescaled = self._loss_scale.of(update) / self._loss_scale.of(window)
        return self.clipping.coefficient(self._totals[window].norm) * rescaled

    def scale(self, window: int) -> float:
        """What the losses of ``window``, and so its gradients, have been multiplied by."""
        return self._loss_scale.of(window)
