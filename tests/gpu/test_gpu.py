"""What only a GPU can show. Each test skips itself, with the reason, where there is none or too few."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from paci_megatron.runtime.device import HostCopy, Stopwatch, memory, reset_peak_memory
from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.helpers import PACI, arguments, emulated
from tests.support.link_jobs import LinkResult, exchange_by_plan

ROOT = Path(__file__).parents[2]
NUM_GPUS = torch.cuda.device_count()

# From length 17 on Megatron would use Apex's softmax kernels.
LENGTH = ["--seq-length", "32", "--max-position-embeddings", "32"]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900), pytest.mark.skipif(NUM_GPUS == 0, reason="needs a CUDA device")]


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def exchange_rank(rank: int, world_size: int, port: int, backend: str, link: str, results: Any) -> None:
    """One process of :func:`exchange`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.cuda.set_device(rank % NUM_GPUS)
    torch.distributed.init_process_group(backend)
    results.put((rank, exchange_by_plan(link, f"cuda:{rank % NUM_GPUS}")))
    torch.distributed.destroy_process_group()


def exchange(world_size: int, backend: str, link: str) -> list[LinkResult]:
    """``exchange_by_plan`` on so many processes, by rank."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [
        context.Process(target=exchange_rank, args=(rank, world_size, port, backend, link, results), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world_size)]


def train(name: str, folder: Path, argv: list[str], processes: int = 1) -> list[float]:
    """The losses of a training in processes of its own, one an update."""
    metrics = folder / f"{name}.jsonl"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    command = [*launcher, str(ROOT / "pretrain_gpt_paci.py"), *argv, "--paci-metrics-file", str(metrics)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [event["loss"] for event in read_metrics(metrics) if event["event"] == "train"]


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
def test_transfers_over_nccl_by_a_plan() -> None:
    results = exchange(min(NUM_GPUS, 4), "nccl", "p2p")
    assert [result.wrong for result in results] == [[]] * len(results)
    assert all(result.received for result in results)
    assert all(result.created == results[0].created for result in results)


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
def test_transfers_over_nccl_with_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    results = exchange(min(NUM_GPUS, 4), "nccl", "p2p")
    assert [result.wrong for result in results] == [[]] * len(results)


def test_transfers_through_the_host_on_one_gpu() -> None:
    results = exchange(3, "gloo", "host")
    assert [result.wrong for result in results] == [[]] * 3
    assert all(result.received for result in results)


def test_processes_on_one_gpu_are_emulated_stages(corpus: str, tmp_path: Path) -> None:
    argv = [*arguments(corpus, 4, 3, *LENGTH, iters=12), *PACI]
    processes = train("processes", tmp_path, [*argv, "--paci-link", "host"], processes=4)
    one = train("emulated", tmp_path, emulated(argv))
    assert len(one) == 12
    assert processes == pytest.approx(one, rel=1e-5)


def test_emulated_training_in_bf16_is_the_same_each_time(corpus: str, tmp_path: Path) -> None:
    argv = [*emulated(arguments(corpus, 4, 3, "--bf16", *LENGTH, iters=20)), *PACI]
    once, again = (train(name, tmp_path, argv) for name in ("once", "again"))
    assert len(once) == 20 and once == again
    (memory,) = [event for event in read_metrics(tmp_path / "once.jsonl") if event["event"] == "memory"][-1:]
    assert memory["process_peak_bytes"][0] > sum(memory["saved_activation_bytes"]) > 0
    assert json.dumps(memory)


def test_the_stopwatch_sees_the_devices_time_and_waits_only_when_read() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    watch = Stopwatch(device)
    begin_s = time.perf_counter()
    for _ in range(20):
        watch.start()
        for _ in range(10):
            matrix @ matrix
        watch.stop()
    measured_s = watch.take_s()
    wall_s = time.perf_counter() - begin_s
    assert 0.5 * wall_s < measured_s <= 1.01 * wall_s
    assert watch.take_s() == 0.0


def test_a_copy_to_the_host_is_of_what_was_computed_before() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    value = torch.zeros(1024, device=device)
    copies = []
    for step in range(1, 6):
        value = value + 1 if step % 2 else value.add_(1)
        torch.cuda._sleep(10_000_000)
        copies.append(HostCopy(value.clone()))
    assert all(copy._tensor.is_pinned() for copy in copies)
    assert [float(copy.wait()[0]) for copy in copies] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_peak_memory_counts_from_the_reset() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    large = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    del large
    reset_peak_memory(device)
    before = memory(device).peak_allocated
    small = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    after = memory(device).peak_allocated
    assert before is not None and after is not None
    assert (1 << 20) <= after - before < (64 << 20)
    del small


@pytest.mark.parametrize(("fused", "is_guarded"), list(itertools.product([False, True], [False, True])))
def test_a_graph_in_flight_survives_the_update(fused: bool, is_guarded: bool) -> None:
    """PyTorch's Adam on a GPU, within the guard of runtime/update.py: the backward meets the new weight."""
    weight = torch.nn.Parameter(torch.full((4,), 2.0, device="cuda"))
    given = torch.full((4,), 3.0, device="cuda", requires_grad=True)
    adam = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, fused=fused)
    output = (weight * given).sum()
    weight.grad = torch.ones_like(weight)
    if not is_guarded:
        adam.step()
        if fused:
            pytest.skip("PyTorch's fused Adam does not tell autograd that it changed the weight")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
        return
    with torch.autograd._unsafe_preserve_version_counter((weight,)):
        adam.step()
    assert not torch.equal(weight, torch.full_like(weight, 2.0))
    output.backward()
    assert given.grad is not None and torch.equal(given.grad, weight.detach())
