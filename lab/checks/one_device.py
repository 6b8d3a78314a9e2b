"""What is checked on one GPU, or in small on a CPU."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from functools import partial

import torch

from paci_megatron.arguments import add_paci_arguments
from paci_megatron.platform.without_te import has_transformer_engine
from paci_megatron.schedule.schedules import sends_in_flight

from .bench import Bench, Sizes, launcher
from .outcome import Check, Measured, SkipCheck

LOSS_DIFFERENCE = 0.03  # of PACI's mean loss at the end of a short training, relative to flush's
ROUNDING_DIFFERENCE = 0.01  # of a loss in bf16, between two ways to compute the same
MEMORY_DIFFERENCE = 0.01
LOOP_OVERHEAD = 0.02

HOST_LINK = ("--paci-link", "host")


def checks(bench: Bench) -> list[Check]:
    """In the order in which they run."""
    sizes = bench.sizes
    emulated, linked = f"{sizes.emulated_stages} emulated stages", f"{sizes.linked_stages} processes on one device"
    listed = [
        ("tests marked gpu", "all pass", tests_marked_gpu),
        (
            f"loss of PACI against flush, {emulated}",
            f"final loss within {LOSS_DIFFERENCE:.0%}, both learn",
            losses_against_flush,
        ),
        (f"PACI twice, {emulated}", "the same losses, bit for bit", same_losses_twice),
        (f"activations of PACI against flush, {emulated}", "equal at every stage, within 1%", saved_activations),
        (
            f"{linked} against emulation",
            f"every loss within {ROUNDING_DIFFERENCE:.0%}" if sizes.bf16 else "the same losses, bit for bit",
            linked_against_emulation,
        ),
        (f"peak memory of PACI against flush, {linked}", "equal in every process, within 1% and transfers", peak_memory),
        ("action loop against the bare model", f"at most {LOOP_OVERHEAD:.0%} slower", loop_overhead),
        (f"trace of {emulated}", "a file a stage, times in order", trace),
        (
            f"fp8 of PACI against flush, {emulated}",
            f"drained within {ROUNDING_DIFFERENCE:.0%}, else the last losses within {LOSS_DIFFERENCE:.0%}",
            quantized_losses,
        ),
    ]
    return [Check(name, bound, partial(run, bench)) for name, bound, run in listed]


def tests_marked_gpu(bench: Bench) -> Measured:
    """The project's own tests that need a GPU. They skip themselves where there is none, or too few."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        raise SkipCheck("pytest is not installed (pip install pytest pytest-timeout)") from None
    command = ["-m", "pytest", "-m", "gpu", "-q", "-rs", "-W", "ignore", "-p", "no:cacheprovider", "tests"]
    log = bench.command("pytest", command, timeout_s=900)
    text = log.read_text(encoding="utf-8")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed)", text.splitlines()[-1])}
    if not counts.get("passed"):
        raise SkipCheck(f"all {counts.get('skipped', 0)} need a GPU")
    return Measured(not counts.get("failed"), ", ".join(f"{n} {word}" for word, n in counts.items()), counts)


def losses_against_flush(bench: Bench) -> Measured:
    """The same training, flushed and not."""
    sizes = bench.sizes
    flush, paci = (
        bench.emulated(f"emulated-{s}", s, sizes.emulated_stages, sizes.updates).losses() for s in ("1f1b", "paci")
    )
    last = max(sizes.updates // 10, 1)
    ends = [sum(losses[-last:]) / last for losses in (flush, paci)]
    difference = ends[1] / ends[0] - 1
    learns = all(end < losses[0] - 0.1 for end, losses in zip(ends, (flush, paci), strict=True))
    differs = flush[sizes.updates // 2 :] != paci[sizes.updates // 2 :]  # else it was flush that was compared with itself
    text = f"{paci[0]:.3f} to {ends[1]:.4f}, flush to {ends[0]:.4f} after {sizes.updates} updates: {difference:+.2%}"
    return Measured(abs(difference) <= LOSS_DIFFERENCE and learns and differs, text, {"flush": flush, "paci": paci})


def same_losses_twice(bench: Bench) -> Measured:
    """A second run of the beginning of the PACI training."""
    sizes = bench.sizes
    once = bench.emulated("emulated-paci", "paci", sizes.emulated_stages, sizes.updates).losses()[: sizes.compared]
    again = bench.emulated("emulated-paci-again", "paci", sizes.emulated_stages, sizes.compared).losses()
    holds, text = _compared(once, again, tolerance=0.0)
    return Measured(holds, text, {"once": once, "again": again})


def saved_activations(bench: Bench) -> Measured:
    """What forwards leave for backwards, at its peak, by stage."""
    sizes = bench.sizes
    flush, paci = (
        bench.emulated(f"emulated-{s}", s, sizes.emulated_stages, sizes.updates).last("memory")["saved_activation_bytes"]
        for s in ("1f1b", "paci")
    )
    return _memory(flush, paci)


def linked_against_emulation(bench: Bench) -> Measured:
    """Processes that share the device, transfers through the host, against the same stages in one process."""
    sizes = bench.sizes
    processes = bench.processes("host-paci", "paci", sizes.linked_stages, sizes.compared, *HOST_LINK).losses()
    one = bench.emulated("emulated-few-paci", "paci", sizes.linked_stages, sizes.compared).losses()
    holds, text = _compared(processes, one, tolerance=ROUNDING_DIFFERENCE if sizes.bf16 else 0.0)
    return Measured(holds, text, {"processes": processes, "emulated": one})


def peak_memory(bench: Bench) -> Measured:
    """The most that each process's tensors hold on the GPU."""
    sizes = bench.sizes
    if not bench.on_gpu:
        raise SkipCheck("nobody counts the memory of tensors on a CPU; activations are compared above")
    flush, paci = (
        bench.processes(f"host-{s}", s, sizes.linked_stages, sizes.compared, *HOST_LINK).last("memory")["process_peak_bytes"]
        for s in ("1f1b", "paci")
    )
    return _memory(flush, paci, transfers_bytes(sizes))


def loop_overhead(bench: Bench) -> Measured:
    """A stage's plan through the executor, without neighbours, against Megatron's forward, backward and update in a loop."""
    output = bench.folder / "action_loop.json"
    updates, repeats = ("20", "5") if bench.on_gpu else ("3", "2")
    command = [*launcher(1), "tools/action_loop_cost.py", "--measure-output", str(output)]
    command += ["--measure-updates", updates, "--measure-repeats", repeats]
    stages = ["--paci-emulate-stages", "2", "--pipeline-schedule", "paci"]
    bench.command("action-loop", [*command, *bench.model_flags(), *bench.data_flags(), *stages])
    figures = json.loads(output.read_text(encoding="utf-8"))
    text = f"{figures['overhead']:+.2%}, {figures['loop_ms']:.1f} ms an update against {figures['bare_ms']:.1f} ms"
    if not bench.on_gpu:
        raise SkipCheck(f"measured {text}; not judged on a CPU, whose cores other work shares")
    return Measured(figures["overhead"] <= LOOP_OVERHEAD, text, figures)


def trace(bench: Bench) -> Measured:
    """A short run with ``--paci-trace-dir``: each stage's file of events."""
    if "--paci-trace-dir" not in _paci_flags():
        raise SkipCheck("this version has no --paci-trace-dir")
    sizes, folder = bench.sizes, bench.folder / "trace"
    bench.emulated("trace", "paci", sizes.emulated_stages, min(sizes.compared, 10), "--paci-trace-dir", str(folder))
    files = sorted(folder.glob("*.jsonl"))
    counts = [sum(1 for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)) for path in files]
    holds = len(files) == sizes.emulated_stages and all(counts)
    return Measured(holds, f"{len(files)} files, {sum(counts)} events", counts)


def quantized_losses(bench: Bench) -> Measured:
    """Trainings in fp8 with current scaling: weights are quantised by Transformer Engine, and again as they change."""
    if not bench.on_gpu or not has_transformer_engine() or torch.cuda.get_device_capability() < (8, 9):
        raise SkipCheck("fp8 needs Transformer Engine and a GPU of compute capability 8.9")
    stages, updates = bench.sizes.emulated_stages, bench.sizes.updates
    fp8, drained = ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"), ("--paci-drain-interval", "1")
    flush = bench.emulated("fp8-1f1b", "1f1b", stages, updates, *fp8).losses()
    same = bench.emulated("fp8-drained", "paci", stages, updates, *fp8, *drained).losses()
    paci = bench.emulated("fp8-paci", "paci", stages, updates, *fp8).losses()
    holds, text = _compared(flush, same, tolerance=ROUNDING_DIFFERENCE)
    last = max(updates // 10, 1)
    difference = sum(paci[-last:]) / sum(flush[-last:]) - 1
    text += f" drained; else {difference:+.2%} at the end"
    figures = {"flush": flush, "drained": same, "paci": paci}
    return Measured(holds and abs(difference) <= LOSS_DIFFERENCE and paci != flush, text, figures)


def _compared(left: Sequence[float], right: Sequence[float], tolerance: float) -> tuple[bool, str]:
    """Whether two curves agree, and how well, in words."""
    if not left or len(left) != len(right):
        return False, f"{len(left)} losses against {len(right)}"
    if list(left) == list(right):
        return True, f"{len(left)} losses equal in every bit"
    worst = max(abs(a / b - 1) for a, b in zip(left, right, strict=True))
    return math.isfinite(worst) and worst <= tolerance, f"{len(left)} losses, the largest difference {worst:.2e}"


def transfers_bytes(sizes: Sizes) -> int:
    """What PACI's transfers hold on a stage at most, and Megatron's, which wait for each, do not: in each direction the
    sends not known to be done, as many receives of activations, and that of a gradient, each as large as an activation.
    """
    tensors = 3 * sends_in_flight(link=0) + 1
    element_bytes = 2 if sizes.bf16 else 4
    return tensors * sizes.seq_length * sizes.micro_batch_size * sizes.hidden_size * element_bytes


def _memory(flush: Sequence[int], paci: Sequence[int], transfers: int = 0) -> Measured:
    """Whether PACI holds what flush does, stage by stage or process by process, up to ``transfers`` bytes more."""
    differences = [mine - its for mine, its in zip(paci, flush, strict=True)]
    holds = all(
        -MEMORY_DIFFERENCE * its <= difference <= MEMORY_DIFFERENCE * its + transfers
        for difference, its in zip(differences, flush, strict=True)
    )
    worst = max((difference / its for difference, its in zip(differences, flush, strict=True)), key=abs)
    shown = " ".join(f"{size / 2**20:.1f}" for size in paci)
    more = f", of which transfers may hold {transfers / 2**20:.1f} MiB" if transfers else ""
    text = f"{worst:+.2%} at most{more}; PACI's in MiB: {shown}"
    return Measured(holds, text, {"flush": list(flush), "paci": list(paci), "transfers": transfers})


def _paci_flags() -> set[str]:
    parser = add_paci_arguments(argparse.ArgumentParser())
    return {flag for action in parser._actions for flag in action.option_strings}
