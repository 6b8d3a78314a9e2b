"""Lets torchrun's ``--max-restarts`` bring a job back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


def of_this_attempt(store: Store) -> Store:
    """The part of ``store`` in which a job finds itself.

    torchrun keeps one store for all attempts of a job, where PyTorch 2.11 expects one for each. Ranks then read the
    addresses that those of the attempt before left there, and wait for them for ever. So each attempt gets names of its own
    here. Over several nodes the attempts are not counted alike, see :func:`restart_warning`.
    """
    from torch.distributed import PrefixStore

    return PrefixStore(f"restart-{_attempt()}", store) if is_restarted() else store


def is_restarted() -> bool:
    """Whether an attempt before may have left its addresses in the store, and this one can be told from it."""
    return _attempt() != "0" and shares_store() and os.environ.get("GROUP_WORLD_SIZE", "1") == "1"


def restart_warning() -> str | None:
    """A line for the start of a job that torchrun could not bring back."""
    restarts, nodes = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if restarts == "0" or nodes == "1" or not shares_store():
        return None
    return (
        f"--max-restarts {restarts} on {nodes} nodes: a restarted job may wait for ever for ranks of the attempt before. "
        "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node."
    )


def shares_store() -> bool:
    """Whether torchrun keeps the ranks' store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
