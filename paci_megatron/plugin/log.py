"""The plugin's lines in the log, on the ranks where people look for them."""

from __future__ import annotations

import os

PREFIX = "paci-megatron:"


def print_line(line: str) -> None:
    """In one write, with its end: under torchrun all processes write to one pipe, unbuffered, and ``print`` writes twice."""
    print(f"{line}\n", end="", flush=True)


def print_first_rank(line: str) -> None:
    """Where Megatron prints what a run is set up to be. Works before there is a process group."""
    if int(os.environ.get("RANK", "0")) == 0:
        print_line(f"{PREFIX} {line}")


def print_last_rank(line: str) -> None:
    """Where Megatron prints how a run goes on."""
    import torch.distributed as dist

    if dist.get_rank() == dist.get_world_size() - 1:
        print_line(f"{PREFIX} {line}")
