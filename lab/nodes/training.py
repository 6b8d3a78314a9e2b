"""One measured training on nodes: torchrun on each, with a rendezvous between them."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lab.benchmark.jobs import Job, RankResult
from lab.processes import CPU_ENVIRONMENT, ROOT, end, tail

from .namespaces import Node

PORT = 29400


class TrainingError(RuntimeError):
    """A node failed or did not finish; the message holds the end of its log."""


def train(job: Job, nodes: Sequence[Node], stages_per_node: int, folder: Path, timeout_s: float) -> list[RankResult]:
    """Run ``job`` with so many ranks on each node; the results of all ranks. Logs go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.pickle"):
        old.unlink()
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    with contextlib.ExitStack() as stack:
        started = []
        for index, node in enumerate(nodes):
            log = stack.enter_context(open(folder / f"node-{index}.log", "wb"))
            command = node.command(*torchrun(nodes, index, stages_per_node), "-m", "lab.nodes.rank", str(folder))
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **CPU_ENVIRONMENT, "GLOO_SOCKET_IFNAME": node.device},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        stack.callback(end, *started)
        deadline_s = time.monotonic() + timeout_s
        while any(process.poll() is None for process in started):
            if time.monotonic() > deadline_s or any(process.poll() for process in started):
                break
            time.sleep(0.1)
        for index, process in enumerate(started):
            if process.poll() != 0:
                log_file = folder / f"node-{index}.log"
                state = "did not finish" if process.poll() is None else f"failed with status {process.poll()}"
                raise TrainingError("\n".join([*tail(log_file), f"node {index} {state}; see {log_file}"]))
    ranks = range(len(nodes) * stages_per_node)
    return [pickle.loads((folder / f"rank-{rank}.pickle").read_bytes()) for rank in ranks]


def torchrun(nodes: Sequence[Node], index: int, stages_per_node: int) -> list[str]:
    """torchrun on a node, up to the script. Nodes are ranked by their addresses.

    Without ``--local-addr`` torchrun would tell the others the machine's name, and without ``is_host`` each node would
    look at the addresses of its name to know whether the rendezvous is served there.
    """
    options = {
        "nnodes": len(nodes),
        "nproc-per-node": stages_per_node,
        "rdzv-id": "paci",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{nodes[0].address}:{PORT}",
        "rdzv-conf": f"is_host={int(index == 0)}",
        "local-addr": nodes[index].address,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "torch.distributed.run", *flags]
