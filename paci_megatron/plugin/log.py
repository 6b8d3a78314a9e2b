"""The plugin's lines in the log, on the ranks where people look for them."""

from __future__ import annotations

import os

PREFIX = "paci-megatron:"


def print_first_rank(line: str) -> None:
    """Where Megatron prints what a run is set up to be. Works before there is a process group."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{PREFIX} {line}", flush=True)


def print_last_rank(line: str) -> None:
    """Where Megatron prints how a run goes on."""
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        print(f"{PREFIX} {line}", flush=True)
