"""What is checked on several GPUs, a stage on each: transfers over NCCL, memory, throughput."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

from .bench import ROOT, Bench
from .one_device import ROUNDING_DIFFERENCE, _compared, _memory, transfers_bytes
from .outcome import Check, Measured, SkipCheck

THROUGHPUT_SHARE = 0.9  # of the speed-up over flush that the schedule could give at most
_BENCHMARK = "tools/benchmark_throughput.py"


def checks(bench: Bench, num_stages: int) -> list[Check]:
    """In the order in which they run."""
    bound = f"every loss within {ROUNDING_DIFFERENCE:.0%}" if bench.sizes.bf16 else "the same losses, bit for bit"
    return [
        Check(f"{num_stages} processes against emulation", bound, partial(against_emulation, bench, num_stages)),
        Check(
            f"peak memory of PACI against flush, {num_stages} GPUs",
            "equal in every process, within 1% and transfers",
            partial(peak_memory, bench, num_stages),
        ),
        Check(
            f"throughput of PACI against flush, {num_stages} GPUs",
            f"at least {THROUGHPUT_SHARE:.0%} of the limit (a+N-1)/a",
            partial(throughput, bench, num_stages),
        ),
    ]


def against_emulation(bench: Bench, num_stages: int) -> Measured:
    """A device for each stage, transfers from device to device, against the same stages in one process."""
    sizes = bench.sizes
    processes = bench.processes("p2p-paci", "paci", num_stages, sizes.compared).losses()
    one = bench.emulated("emulated-as-p2p", "paci", num_stages, sizes.compared).losses()
    holds, text = _compared(processes, one, tolerance=ROUNDING_DIFFERENCE if sizes.bf16 else 0.0)
    return Measured(holds, text, {"processes": processes, "emulated": one})


def peak_memory(bench: Bench, num_stages: int) -> Measured:
    """The most that each process's tensors hold, a GPU for each."""
    if not bench.on_gpu:
        raise SkipCheck("nobody counts the memory of tensors on a CPU")
    flush, paci = (
        bench.processes(f"p2p-{s}", s, num_stages, bench.sizes.compared).last("memory")["process_peak_bytes"]
        for s in ("1f1b", "paci")
    )
    measured = _memory(flush, paci, transfers_bytes(bench.sizes))
    # The backend's own memory, which PyTorch does not count: each communicator that receives has buffers for its channels.
    beside = bench.processes("p2p-paci", "paci", num_stages, bench.sizes.compared).last("memory")["process_device_bytes"]
    return replace(measured, text=f"{measured.text}; beside PyTorch's: {' '.join(f'{size / 2**20:.0f}' for size in beside)}")


def throughput(bench: Bench, num_stages: int) -> Measured:
    """The benchmark's figures of PACI, with 1F1B and interleaved 1F1B beside."""
    if not (ROOT / _BENCHMARK).exists():
        raise SkipCheck(f"there is no {_BENCHMARK}")
    if not bench.on_gpu:
        raise SkipCheck("not judged on a CPU, whose cores other work shares")
    output = bench.folder / "throughput.json"
    command = [_BENCHMARK, "--schedules", "1f1b", "paci", "interleaved:2", "--num-stages", str(num_stages)]
    command += ["--microbatches-per-update", str(num_stages), "--iterations", "30", "--output", str(output)]
    bench.command("throughput", command, timeout_s=900)
    rows = json.loads(output.read_text(encoding="utf-8"))
    return judged(rows)


def judged(rows: list[dict[str, Any]]) -> Measured:
    """The benchmark's rows held against the limit."""
    (paci,) = (row for row in rows if row["schedule"] == "paci")
    share = paci["speedup_vs_flush"] / paci["limit_vs_flush"]
    others = ", ".join(f"{row['schedule']} {row['tokens_per_second']:.0f}" for row in rows)
    text = f"{paci['speedup_vs_flush']:.3f} of {paci['limit_vs_flush']:.3f} ({share:.0%}); tokens/s: {others}"
    return Measured(share >= THROUGHPUT_SHARE, text, rows)
