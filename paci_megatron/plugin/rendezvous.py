"""Waits for all ranks before Megatron makes its process groups, and says which one is missing.

PyTorch waits for them too, but without a word.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from paci_megatron.config import ConfigError

from .log import PREFIX
from .restarts import is_restarted, of_this_attempt, shares_store

_FIRST_LINE_S = 15.0  # ranks that import from a cold disk are seconds apart; each further line comes after twice the time
_POLL_S = 0.2
_NAMED = 8  # so many missing ranks are named
_ALL_HERE = "paci/all"


def shared_store(args: argparse.Namespace) -> dist.Store | None:
    """The store over which Megatron's ranks are to find each other, once all of them have come.

    None where there is nothing to wait for: one process, groups that exist already, Megatron's ``--fake-process-group``.
    ``ConfigError`` if the addresses are of no use, or when a rank has not come in ``--distributed-timeout-minutes``.
    """
    alone = args.world_size == 1 and not is_restarted()
    if alone or dist.is_initialized() or args.fake_process_group:
        return None
    waiting = Waiting(args.rank, args.world_size, 60.0 * args.distributed_timeout_minutes)
    store = of_this_attempt(waiting.connect())
    waiting.until_all_are_here(store)
    return store


class Waiting:
    """One rank, which waits for the others."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, first_line_s: float = _FIRST_LINE_S) -> None:
        """``MASTER_ADDR`` and ``MASTER_PORT`` of the environment say where; nothing is opened yet."""
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConfigError(f"WORLD_SIZE {world_size} without {' and '.join(missing)}. Start with torchrun, or set them.")
        self.rank = rank
        self.world_size = world_size
        self._address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self._place = f"MASTER_ADDR {self._address[0]}, MASTER_PORT {self._address[1]}"
        self._began_s = time.monotonic()
        self._timeout_s = timeout_s
        self._first_line_s = first_line_s

    def connect(self) -> dist.TCPStore:
        """A connection to the store, which torchrun or rank 0 keeps; made here on rank 0, without torchrun."""
        keeps = self.rank == 0 and not shares_store()
        if not keeps:
            missing = f"rank 0 is not at {self._place}"
            self._until(self._answers, lambda: missing, speaks=os.environ.get("LOCAL_RANK", "0") == "0")
        try:
            return dist.TCPStore(
                *self._address,
                is_master=keeps,
                timeout=timedelta(seconds=self._timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except dist.DistNetworkError as error:
            reason = str(error).split("\n")[0]
            raise ConfigError(f"{self._place}: {reason}. Give a port that is free on the machine of rank 0.") from error

    def until_all_are_here(self, store: dist.Store) -> None:
        """Say that this rank has come, and return when all have; rank 0 says meanwhile which have not."""
        keys = [f"paci/{rank}" for rank in range(self.world_size)]

        def missing() -> str:
            ranks = [rank for rank, key in enumerate(keys) if not store.check([key])]
            named = ", ".join(map(str, ranks[:_NAMED])) + (" ..." if len(ranks) > _NAMED else "")
            here = f"{self.world_size - len(ranks)} of {self.world_size} ranks have come to {self._place}"
            return f"{here}, rank{'s' if len(ranks) > 1 else ''} {named} not"

        try:
            store.set(keys[self.rank], "")
            if self.rank == 0:
                self._until(lambda: store.check(keys), missing, speaks=True)
                store.set(_ALL_HERE, "")
            else:
                self._until(lambda: store.check([_ALL_HERE]), missing, speaks=False)
        except dist.DistNetworkError as error:
            raise ConfigError(f"rank 0 at {self._place} has ended. Its own last lines say why.") from error

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._address, timeout=5.0).close()
        except OSError:
            return False
        return True

    def _until(self, happens: Callable[[], bool], missing: Callable[[], str], speaks: bool) -> None:
        line_s, ends = self._first_line_s, f"{self._timeout_s / 60:g} min (--distributed-timeout-minutes)"
        while not happens():
            waited_s = time.monotonic() - self._began_s
            if waited_s > self._timeout_s:
                raise ConfigError(
                    f"{missing()} after {ends}. Start all {self.world_size} processes with this address and port, or "
                    "give the WORLD_SIZE that is started."
                )
            if speaks and waited_s > line_s:
                line_s *= 2
                print(
                    f"{PREFIX} rank {self.rank} has waited for {waited_s:.0f} s: {missing()}. Start what is missing with "
                    f"this address and port and WORLD_SIZE {self.world_size}, or see why it does not start; the job ends "
                    f"after {ends}",
                    flush=True,
                )
            time.sleep(_POLL_S)
