"""The scripts that reproduce the paper (examples/gpt), and how tests run them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lab.processes import ROOT

EXAMPLES = ROOT / "examples/gpt"
TRAIN, SLURM, PREPARE = (
    EXAMPLES / name for name in ("pretrain_gpt2_medium.sh", "pretrain_gpt2_medium.slurm", "prepare_openwebtext.sh")
)


class Arm(NamedTuple):
    """What selects an arm of the paper."""

    schedule: str
    global_batch: int
    microbatches: int

    def environment(self) -> dict[str, str]:
        return dict(zip(("SCHEDULE", "GLOBAL_BATCH", "MICROBATCHES"), map(str, self), strict=True))

    def __str__(self) -> str:
        return f"{self.schedule}-b{self.global_batch}-a{self.microbatches}"


PACI = Arm("paci", 128, 8)


def bash(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``script`` with no variables but these and the machine's own."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **kept, **variables}
    return subprocess.run([str(script), *arguments], capture_output=True, text=True, env=environment, timeout=200)


def printed(arm: Arm, *arguments: str, **variables: str) -> list[str]:
    """The command that an arm would run."""
    done = bash(TRAIN, *arguments, DRY_RUN="print", **arm.environment(), **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def value(command: list[str], flag: str) -> str:
    """The one value of a flag that must be there once."""
    assert command.count(flag) == 1, flag
    return command[command.index(flag) + 1]
