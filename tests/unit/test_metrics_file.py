"""The metrics file: what a kill leaves is readable, and a resumed run goes on behind it."""

from __future__ import annotations

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
