"""Commands of this project as child processes: their output in a log, ended in order, and quoted when they fail."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
"""The project's checkout."""

# One thread, so that forking is safe and stages have a core each. No torch.compile: each process would spend ten seconds on
# Megatron's small fused functions, of which a CPU uses none.
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}

TAIL_LINES = 30
# torchrun gives its workers 30 s.
END_TIMEOUT_S = 40.0


def environment(on_gpu: bool) -> dict[str, str]:
    """The environment of all commands."""
    threads = {"OMP_NUM_THREADS": "1"}
    return {**os.environ, **(threads if on_gpu else CPU_ENVIRONMENT), "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[str], log: IO[Any], variables: dict[str, str], pipe: bool = False) -> subprocess.Popen[Any]:
    """Start Python with ``command`` in the project's root. Its output goes to ``log`` after a line that says what it is, or
    with ``pipe`` to the returned process's ``stdout``.
    """
    log.write(f"$ python {shlex.join(command)}\n".encode())
    log.flush()
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if pipe else log,
        stderr=subprocess.STDOUT,
        # Ctrl-C is for this process alone, which then ends the children in order.
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def end(*processes: subprocess.Popen[Any]) -> None:
    """Ask the processes to end, torchrun its workers first, and kill what is left of each after a while."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + END_TIMEOUT_S
    for process in running:
        try:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tail(log: Path) -> list[str]:
    """The last lines of ``log``, without torchrun's own, which say only that a process failed; none if it is not there."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    first = next((index for index, line in enumerate(lines) if "failed (exitcode:" in line), len(lines))
    return lines[:first][-TAIL_LINES:]


def failure(name: str, status: int, log: Path) -> str:
    """What to say of a command that failed: the end of its log, and where the rest is."""
    return "\n".join([*tail(log), f"{name} failed with status {status}; see {log}"])


def _end_with_parent() -> None:
    """In a child: be told to end when this process is killed. Linux only; elsewhere it leaves its children."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
