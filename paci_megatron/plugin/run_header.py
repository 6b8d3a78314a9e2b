"""What a metrics file says first about each process that writes to it: how to run it again, and what its figures mean."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import megatron.core
import torch

from paci_megatron.config import PaciConfig
from paci_megatron.runtime.device import device_name

from .describe import describe

_PACKAGES = ("paci-megatron", "transformer-engine", "apex", "flash-attn")


def run_header(args: argparse.Namespace, microbatches_per_update: int, device: torch.device) -> dict[str, Any]:
    """The fields of the event ``run``. ``iteration`` is how many were done before.

    ``set_up`` has the lines that this process's log has about the command line: what was switched off or replaced, and what
    the schedule does.
    """
    a, runs_plans = microbatches_per_update, args.pipeline_schedule != "1f1b" or args.paci_emulate_stages is not None
    config = PaciConfig.from_args(args) if runs_plans else None
    described = describe(config, args.clip_grad, a) if config is not None else []
    return {
        "schedule": args.pipeline_schedule,
        "iteration": args.iteration,
        "num_stages": args.pipeline_model_parallel_size,
        "chunks_per_stage": args.virtual_pipeline_model_parallel_size or 1,
        "emulated": args.paci_emulate_stages is not None,
        "microbatches_per_update": a,
        "slack": config.slack if config is not None else (),
        "weight_policy": args.paci_weight_policy,
        "clip_grad": args.clip_grad,
        "clip_mode": args.paci_clip_mode,
        "micro_batch_size": args.micro_batch_size,
        "seq_length": args.seq_length,
        "data_parallel_size": args.data_parallel_size,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
        "train_iters": args.train_iters,
        "trace_dir": args.paci_trace_dir and os.path.abspath(args.paci_trace_dir),
        "device": device_name(device),
        "command": launch_command(sys.orig_argv, os.environ),
        "folder": os.getcwd(),
        "versions": versions(),
        "set_up": [*getattr(args, "paci_set_up", []), *described],
    }


def launch_command(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command that starts what the interpreter was started with as ``argv``; torchrun has told its sizes in
    ``environment``.
    """
    program = [word for word in argv[1:] if word != "-u"]
    if "TORCHELASTIC_RUN_ID" not in environment:
        return shlex.join(["python", *program])
    processes, here = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    nodes = ["--nnodes", str(processes // here)] if processes > here else []
    return shlex.join(["torchrun", *nodes, "--nproc-per-node", str(here), *program])


def versions() -> dict[str, str]:
    """Of what decides a run's results and speed, by name."""
    found = {
        "megatron-core": megatron.core.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
