"""The metrics file: what a kill leaves is readable, and a resumed run goes on behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from paci_megatron.telemetry.metrics_file import MetricsFile, read_metrics


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_kill_cut_is_dropped_and_the_next_run_appends(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs" / "metrics.jsonl"
    first = MetricsFile(path)
    first.write("train", iteration=1)
    first.write("train", iteration=2, text="é" * 10)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_metrics(path) == [{"event": "train", "iteration": 1}]
    MetricsFile(path).write("train", iteration=3)
    assert [event["iteration"] for event in read_metrics(path)] == [1, 3]


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train"}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(path)


def test_a_full_disk_is_said_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    file = MetricsFile("/dev/full")
    for iteration in range(3):
        file.write("train", iteration=iteration)
    assert capsys.readouterr().err == (
        "paci-megatron: /dev/full cannot be written (No space left on device); training goes on, lines will be missing\n"
    )


def test_lines_stay_whole_where_the_disk_is_full_for_a_while(tmp_path: Path) -> None:
    """With at most 100 bytes a file: the third event is cut, the fourth and fifth find no room, the last has it again."""
    path = tmp_path / "metrics.jsonl"
    code = f"""
import resource, signal
from paci_megatron.telemetry.metrics_file import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = MetricsFile({str(path)!r})
for limit, iteration in ((100, 1), (100, 2), (100, 3), (100, 4), (100, 5), (200, 6)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    file.write("train", iteration=iteration)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("cannot be written (File too large)")) == (0, 1), done.stderr
    assert [event["iteration"] for event in read_metrics(path)] == [1, 2, 6]
    assert path.read_bytes().endswith(b"}\n")
