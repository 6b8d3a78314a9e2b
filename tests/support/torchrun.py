"""A job of a small model under torchrun, as a user starts one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from lab.processes import CPU_ENVIRONMENT, ROOT

MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--untie-embeddings-and-output-weights"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64"),
    *(
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--lr",
        "5e-3",
        "--lr-decay-style",
        "constant",
        "--clip-grad",
        "0",
    ),
    *("--eval-interval", "100", "--eval-iters", "1", "--log-interval", "1", "--num-workers", "0"),
]


def start(*command: str, processes: int = 2, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """torchrun with ``command`` on that many processes, from the repository's root. Its output comes together."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*argv, *launcher, *command], cwd=ROOT, env=environment, **pipes)


def wait_for(job: subprocess.Popen[str], iteration: int) -> list[str]:
    """Reads on until the log line of ``iteration``; the lines so far."""
    assert job.stdout is not None
    printed = []
    for line in job.stdout:
        printed.append(line)
        if re.search(rf" iteration +{iteration}/", line):
            return printed
    raise AssertionError("".join(printed)[-3000:])


def finish(job: subprocess.Popen[str], timeout_s: float = 180) -> str:
    """What the job prints from here to its end."""
    try:
        return job.communicate(timeout=timeout_s)[0]
    finally:
        job.kill()


def torchrun(*command: str, processes: int = 2) -> tuple[int, str]:
    """The exit status and the output of a job."""
    job = start(*command, processes=processes)
    output = finish(job)
    return job.returncode, output
