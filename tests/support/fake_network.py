"""A network of threads with what NCCL's transfers have in common, in the place of ``torch.distributed``'s own.

A transfer happens when both its ends are posted, or later, at a moment of its own. Those of a group and direction happen in
the order in which they were posted. A receive's buffer holds NaN from when it is posted until its ``wait`` returns; what is
sent is read only when the transfer happens, and if nobody holds it by then, its memory has been used again; whoever waits
does so until then.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class _Channel:
    """The ends that are posted, and whose transfers have not happened."""

    sends: deque[Transfer] = field(default_factory=deque)
    receives: deque[Transfer] = field(default_factory=deque)

    def carry(self, up_to: int) -> None:
        """Let so many transfers happen that have both ends, in order."""
        for _ in range(up_to):
            if not (self.sends and self.receives):
                return
            send, receive = self.sends.popleft(), self.receives.popleft()
            tensor, buffer = send.tensor(), receive.tensor()
            if tensor is None and buffer is not None:
                tensor = torch.full_like(buffer, torch.nan)
            assert tensor is not None, "a receive whose buffer is gone"
            receive.arrived = send.arrived = tensor.detach().clone()


@dataclass
class Transfer:
    """One end of a transfer, as the work that ``torch.distributed`` returns."""

    network: FakeNetwork
    channel: _Channel
    tensor: weakref.ref[torch.Tensor]
    receives: bool
    arrived: torch.Tensor | None = None

    def wait(self) -> None:
        """Return when the transfer has happened; a receive's buffer has the data from then on."""
        with self.network.changed:
            while self.arrived is None:
                self.channel.carry(up_to=1)
                if self.arrived is None and not self.network.changed.wait(timeout=20):
                    raise TimeoutError("a transfer whose other end is never posted")
            self.network.changed.notify_all()
        if self.receives and (buffer := self.tensor()) is not None:
            buffer.data.copy_(self.arrived)


class FakeNetwork:
    """Stands in for the names of ``torch.distributed`` that links use. A thread's name is its rank."""

    ProcessGroup = Any

    def __init__(self, seed: int) -> None:
        """``seed`` decides when transfers happen that nobody waits for yet."""
        self.changed = threading.Condition()
        self._random = random.Random(seed)
        self._channels: dict[Any, _Channel] = defaultdict(_Channel)

    @staticmethod
    def get_rank() -> int:
        """See ``torch.distributed.get_rank``."""
        return int(threading.current_thread().name)

    def _posted(self, tensor: torch.Tensor, way: tuple[Any, int], source: Any, destination: Any, receives: bool) -> Transfer:
        with self.changed:
            channel = self._channels[way, str(source), str(destination)]
            transfer = Transfer(self, channel, weakref.ref(tensor), receives)
            (channel.receives if receives else channel.sends).append(transfer)
            channel.carry(up_to=self._random.randrange(3))
            self.changed.notify_all()
        return transfer

    def isend(self, tensor: torch.Tensor, dst: int, group: Any, tag: int = 0) -> Transfer:
        """See ``torch.distributed.isend``."""
        return self._posted(tensor, (group, tag), threading.current_thread().name, dst, receives=False)

    def irecv(self, tensor: torch.Tensor, src: int, group: Any, tag: int = 0) -> Transfer:
        """See ``torch.distributed.irecv``."""
        tensor.data.fill_(torch.nan)  # past autograd's version counter, as NCCL's kernels write
        return self._posted(tensor, (group, tag), src, threading.current_thread().name, receives=True)
