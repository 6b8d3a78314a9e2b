"""Where a command writes is looked at before anything is built, and no file of the user's own is ever changed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.plugin.places import check_places
from paci_megatron.telemetry.metrics_file import MetricsFile, open_to_append, read_metrics


def namespace(**changes: Any) -> argparse.Namespace:
    """Arguments that name no place, with changes."""
    names = ("save", "tensorboard_dir", "data_cache_path", "paci_trace_dir", "paci_metrics_file", "paci_emulate_stages")
    values = {**dict.fromkeys(names), "pipeline_model_parallel_size": 2, **changes}
    return argparse.Namespace(**{key: str(value) if isinstance(value, Path) else value for key, value in values.items()})


FOREIGN = {
    "text": b"my notes\n" * 1000,
    "no newline": b"x" * 3_000_000,
    "half a line": b"my notes",
    "json": b'{"loss": 1.0}\n',
    "list": b'["event"]\n',
    "ours, then notes": b'{"event": "train"}\nmy notes\n',
    "ours, then a note": b'{"event": "train"}\nmy notes',
    "notes, then ours": b'my notes\n{"event": "train"}\n',
    "binary": bytes(range(256)) * 8,
    "empty lines": b"\n\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_that_is_not_ours_is_refused_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    for name in ("metrics.jsonl", "stage-1.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"^--paci-metrics-file \S*metrics.jsonl: .* left as it is: .*Give another\.$"):
        check_places(namespace(paci_metrics_file=tmp_path / "metrics.jsonl"))
    with pytest.raises(ConfigError, match=r"^--paci-trace-dir .*stage-1.jsonl is not the run's own file"):
        check_places(namespace(paci_trace_dir=tmp_path))
    with pytest.raises(ValueError):
        open_to_append(tmp_path / "metrics.jsonl")
    MetricsFile(tmp_path / "metrics.jsonl").write("train", iteration=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize("end", [b"", b"{", b'{"event": "tra', b'{"event": "train", "iteration": 2}'])
def test_what_a_killed_run_leaves_is_ours(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    for whole in (b"", b'{"event": "train", "iteration": 1}\n'):
        path.write_bytes(whole + end)
        check_places(namespace(paci_metrics_file=path, paci_trace_dir=tmp_path))
        assert path.read_bytes() == whole + end, "a look changes nothing"
        MetricsFile(path).write("train", iteration=3)
        assert path.read_bytes() == whole + b'{"event": "train", "iteration": 3}\n'


def test_a_long_file_of_ours_is_looked_at_from_both_ends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "train", "iteration": 1}\n' * 100_000 + b'{"event"')
    check_places(namespace(paci_metrics_file=path))
    MetricsFile(path).write("train", iteration=2)
    assert len(read_metrics(path)) == 100_001


@pytest.mark.parametrize(
    ("flag", "place", "message"),
    [
        ("paci_metrics_file", "", r"--paci-metrics-file \S+: \S+ is a folder. Give the path of a file"),
        ("paci_metrics_file", "file/metrics.jsonl", r"--paci-metrics-file \S+: \S+/file is not a folder"),
        ("paci_trace_dir", "file", r"--paci-trace-dir \S+/file: \S+/file is not a folder"),
        ("paci_trace_dir", "file/deeper/down", r"--paci-trace-dir \S+: \S+/file is not a folder"),
        ("save", "file", r"--save \S+: \S+/file is not a folder"),
        ("save", "file/x", r"--save \S+: \S+/file is not a folder"),
        ("tensorboard_dir", "file", r"--tensorboard-dir \S+: \S+/file is not a folder"),
        ("data_cache_path", "file", r"--data-cache-path \S+: \S+/file is not a folder"),
        ("save", "/proc/nowhere", r"--save /proc/nowhere: no file can be made in /proc \("),
        ("paci_metrics_file", "/proc/x/metrics.jsonl", r"no file can be made in /proc \("),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, flag: str, place: str, message: str) -> None:
    (tmp_path / "file").write_text("something")
    with pytest.raises(ConfigError, match=message):
        check_places(namespace(**{flag: tmp_path / place}))
    assert (tmp_path / "file").read_text() == "something"


def test_places_that_are_still_to_be_made_are_accepted_and_not_made(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    check_places(namespace(save=new, paci_trace_dir=new, tensorboard_dir=new, paci_metrics_file=new / "m.jsonl"))
    check_places(namespace(save="msc://bucket/run", paci_metrics_file=Path("/dev/null")))
    assert not (tmp_path / "a").exists()
