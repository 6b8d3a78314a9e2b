"""``paci-megatron doctor`` on this machine, in whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.processes import CPU_ENVIRONMENT, ROOT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_this_machine_trains_as_it_must_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "empty", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "paci_megatron.cli.main", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 losses bit for bit, and without drains the drift that it may have (by stage: 1 0 updates)" in done.stdout
    assert all(line.startswith(("PASS  ", "SKIP  ")) for line in done.stdout.splitlines()) and not done.stderr
    assert not list(folder.iterdir()) and not list(temporary.iterdir())
