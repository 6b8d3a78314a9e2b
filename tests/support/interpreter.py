"""Code that changes Megatron or torch, in a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from .pool import starter


def run(code: str) -> str:
    """What ``code`` prints, in a process with everything imported and nothing installed; fails the test if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with starter().environment():
            process = starter().context.Process(target=_run, args=(code, output))  # type: ignore[attr-defined]
            process.start()
        process.join()
        printed = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    return printed


def _run(code: str, output: Path) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
