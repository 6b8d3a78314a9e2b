"""Lets torchrun's ``--max-restarts`` bring a job back."""

from __future__ import annotations

import os
from typing import Any


def restarted_store() -> Any:
    """The store in which a job that torchrun has restarted finds itself; None where Megatron's own way is right.

    torchrun keeps one store for all attempts of a job, where PyTorch 2.11 expects one for each. Ranks then read the
    addresses that those of the attempt before left there, and wait for them for ever. So each attempt gets names of its own
    here. Over several nodes the attempts are not counted alike, see :func:`restart_warning`.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or not _shares_store() or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return None
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return PrefixStore(f"restart-{attempt}", store)


def restart_warning() -> str | None:
    """A line for the start of a job that torchrun could not bring back."""
    restarts, nodes = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if restarts == "0" or nodes == "1" or not _shares_store():
        return None
    return (
        f"--max-restarts {restarts} on {nodes} nodes: a restarted job may wait for ever for ranks of the attempt before. "
        "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every node."
    )


def _shares_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
