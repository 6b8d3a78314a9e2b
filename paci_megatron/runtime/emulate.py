"""N stages in one process: transfers that hand tensors over."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

import torch

from paci_megatron.schedule.plan import Plan

from .control import Record
from .hand_over import HandOver, LocalRecords
from .link_times import LinkTimes
from .links import Neighbour, StageLink

HandedOver = defaultdict[tuple[str, int], HandOver]
"""By what it is and the link between stages."""

WAYS = (("ACTIVATIONS", "TOTALS"), ("GRADIENTS", "REPORTS"))
"""What goes from a stage to the next, and back."""


def local_neighbour(handed: HandedOver, here: int, there: int) -> Neighbour:
    """Stage ``there`` as stage ``here``, next to it in the same process, sees it."""
    link = min(here, there)
    (sent, told), (received, heard) = WAYS if here < there else reversed(WAYS)
    records = LocalRecords(handed[told, link], handed[heard, link])
    return Neighbour(handed[sent, link], handed[received, link], records)


class InProcessExchange:
    """One end of a :class:`~.tied_embeddings.TensorExchange` between two stages of a process."""

    def __init__(self) -> None:
        self._other = self
        self._received: deque[torch.Tensor] = deque()

    @classmethod
    def pair(cls) -> tuple[InProcessExchange, InProcessExchange]:
        """The two ends."""
        one, other = cls(), cls()
        one._other, other._other = other, one
        return one, other

    def send(self, tensor: torch.Tensor) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        self._other._received.append(tensor.clone())

    def receive(self) -> torch.Tensor:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        return self._received.popleft()

    def drain(self) -> None:
        """See :class:`~.tied_embeddings.TensorExchange`."""
        if self._received:
            raise RuntimeError(f"{len(self._received)} tied gradients not taken at a drain: a bug in the plan")


class InProcessTransport:
    """A :class:`~.links.Transport` of stages that are all in this process."""

    receives_hold_device = False

    def __init__(self, num_stages: int, ties_embeddings: bool, agree: Callable[[Record], Record]) -> None:
        """``agree`` makes one record of those of several such processes, replicas of the pipeline."""
        handed: HandedOver = defaultdict(HandOver)
        self._links = []
        for here in range(num_stages):
            previous, following = (
                local_neighbour(handed, here, there) if 0 <= there < num_stages else None for there in (here - 1, here + 1)
            )
            self._links.append(StageLink(previous, following))
        ends = (0, num_stages - 1) if ties_embeddings else ()
        self._exchanges = dict(zip(ends, InProcessExchange.pair(), strict=False))
        self.agree = agree

    def link(self, stage_index: int, plan: Plan) -> StageLink:
        """See :class:`~.links.Transport`."""
        return self._links[stage_index]

    def tied_exchange(self, stage_index: int, record_lag: int) -> InProcessExchange | None:
        """See :class:`~.links.Transport`."""
        return self._exchanges.get(stage_index)

    def rank_of(self, stage_index: int) -> int:
        """See :class:`~.links.Transport`."""
        return 0

    def link_times(self) -> dict[int, LinkTimes]:
        """See :class:`~.links.Transport`: no time at all."""
        return {}
