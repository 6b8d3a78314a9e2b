"""A training on two nodes, network namespaces with a slow link between them, by torchrun with a rendezvous."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.nodes.main import main
from lab.nodes.namespaces import unavailable
from paci_megatron.telemetry.metrics_file import read_metrics


@pytest.mark.slow
def test_auto_measures_the_delay_between_two_nodes_and_hides_it(tmp_path: Path) -> None:
    if (reason := unavailable()) is not None:
        pytest.skip(f"no nodes can be made here: {reason}")
    output = tmp_path / "rows.json"
    assert main(["--schedules", "paci:auto", "--delay-ms", "30", "--iterations", "4", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text(encoding="utf-8"))
    (metrics,) = output.with_suffix(".logs").glob("*/metrics.jsonl")
    (choice,) = [event for event in read_metrics(metrics) if event["event"] == "slack"]
    (latency_ms,) = choice["latency_ms"]
    assert 30 <= latency_ms < 60
    assert row["slack"] == choice["slack"] and choice["slack"][0] >= 1
    # Without slack a micro-batch takes 90 ms and the delay; nothing is faster than the stages.
    assert row["ms_per_iteration"] >= 4 * 90 * 0.97
