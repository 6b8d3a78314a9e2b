"""Checks a machine with GPUs: that what the tests promise on a CPU holds there. One command, a table, a JSON file.

tools/gpu_check.py                   one GPU, 8 minutes
tools/gpu_check.py --multi           every GPU: a stage on each, over NCCL, after the same on one
tools/gpu_check.py --cpu             the same in small on a CPU, in a few minutes
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a checkout that is not installed works too

# Of what pyproject.toml requires, what is used here, as it is imported.
_REQUIRED = ("torch", "megatron.core", "numpy", "packaging", "psutil", "sentencepiece")


def missing_modules(names: tuple[str, ...] = _REQUIRED) -> list[str]:
    """Those of ``names`` that cannot be imported."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # its parent package
            return True

    return [name for name in names if is_missing(name)]


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "gpu_check", metavar="DIR", help="logs, gpu_check.json"
    )
    parser.add_argument("--cpu", action="store_true", help="small sizes on the CPU, for machines without a GPU")
    parser.add_argument("--multi", action="store_true", help="also a stage on each GPU (with --cpu, two processes)")
    parser.add_argument("--only", metavar="WORDS", help="only the checks whose name contains these words")
    return parser.parse_args(argv)


def _machine(on_gpu: bool) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if on_gpu else []
    versions = {"python": platform.python_version(), "torch": torch.__version__, "megatron": version("megatron-core")}
    return {"gpus": gpus, "cuda": torch.version.cuda if on_gpu else None, **versions}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 if nothing failed, 1 if a check did, 2 if none could run."""
    arguments = _parse_arguments(argv)
    if missing := missing_modules():
        print(f"gpu_check.py: error: cannot import {', '.join(missing)}. Run: pip install {ROOT}", file=sys.stderr)
        return 2
    import torch

    num_gpus = torch.cuda.device_count()
    if not arguments.cpu and not num_gpus:
        print("gpu_check.py: error: no CUDA device here. --cpu runs the checks in small on the CPU.", file=sys.stderr)
        return 2
    if arguments.multi and not arguments.cpu and num_gpus < 2:
        print(f"gpu_check.py: error: --multi needs two GPUs or more, and there is {num_gpus}.", file=sys.stderr)
        return 2
    return _run(arguments, num_gpus)


def _run(arguments: argparse.Namespace, num_gpus: int) -> int:
    from lab.checks import many_gpus, one_device
    from lab.checks.bench import CPU_SIZES, GPU_SIZES, Bench
    from lab.checks.outcome import exit_status, perform, table, write_json

    begin_s = time.perf_counter()
    on_gpu = not arguments.cpu
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, GPU_SIZES if on_gpu else CPU_SIZES, on_gpu)
    checks = one_device.checks(bench)
    if arguments.multi:
        checks += many_gpus.checks(bench, num_stages=_stages(num_gpus, bench.sizes.num_layers) if on_gpu else 2)
    chosen = [check for check in checks if arguments.only is None or arguments.only in check.name]
    if not chosen:
        names = "\n".join(f"  {check.name}" for check in checks)
        print(
            f"gpu_check.py: error: --only {arguments.only}: no check has these words. There are:\n{names}", file=sys.stderr
        )
        return 2
    machine = _machine(on_gpu)
    print(
        f"{', '.join(machine['gpus']) or 'CPU'}; torch {machine['torch']}, megatron-core {machine['megatron']}", flush=True
    )
    outcomes = []
    for check in chosen:
        print(f"... {check.name}", flush=True)
        outcomes.append(perform(check))
        print(f"{outcomes[-1].status}  {outcomes[-1].measured} ({outcomes[-1].seconds:.0f} s)", flush=True)
    write_json(folder / "gpu_check.json", machine, outcomes)
    print(f"\n{table(outcomes)}\n{folder / 'gpu_check.json'}; {time.perf_counter() - begin_s:.0f} s")
    return exit_status(outcomes)


def _stages(num_gpus: int, num_layers: int) -> int:
    """As many as GPUs, of which each needs the same number of layers."""
    return max(stages for stages in range(2, num_gpus + 1) if num_layers % stages == 0)


if __name__ == "__main__":
    sys.exit(main())
