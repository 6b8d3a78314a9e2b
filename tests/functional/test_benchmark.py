"""The throughput benchmark as a user runs it, on two processes. Speeds are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def benchmark(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/benchmark_throughput.py"), "--num-stages", "2", "--iterations", "3"]
    command += ["--microbatches-per-update", "2", "--repeats", "1", "--output", str(output), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=output.parent, env=environment, timeout=280)


def test_schedules_are_measured_side_by_side(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    done = benchmark(output, "--schedules", "1f1b", "paci", "interleaved:2", "--timed-stage-ms", "2:4")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["schedule"]: row for row in json.loads(output.read_text())}
    assert list(rows) == ["1f1b", "paci", "interleaved:2"]
    for row in rows.values():
        assert row["num_stages"] == row["microbatches_per_update"] == 2
        assert row["tokens_per_second"] > 0 and row["speedup_vs_flush"] > 0
        assert 0 < row["bottleneck_utilization"] <= 1
        assert row["repeats"] == 1 and row["settings"]["timed_stage_ms"] == [[2, 4]]
    assert rows["paci"]["limit_vs_flush"] == 1.5 and rows["interleaved:2"]["limit_vs_flush"] == 1.2
    assert rows["paci"]["max_drift"] == [1, 0] and rows["1f1b"]["max_drift"] == [0, 0]
    flush_bytes = rows["1f1b"]["peak_activation_bytes"]
    assert rows["paci"]["peak_activation_bytes"] == flush_bytes and flush_bytes[0] > flush_bytes[1] > 0
    assert output.with_suffix(".png").exists()
    assert "interleaved:2" in done.stdout and str(output) in done.stdout


@pytest.mark.slow
def test_a_training_that_fails_is_shown_with_the_end_of_its_log(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    done = benchmark(output, "--schedules", "paci", "--", "--paci-look-ahead")
    assert done.returncode == 1 and json.loads(output.read_text()) == []
    assert "failed" in done.stderr and "--paci-look-ahead in fp32: the model" in done.stderr
