"""Packed sequences (``--dataloader-inter-document-masking``) under PACI."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated, without
from tests.support.packing import attention_within_sequences

A, UPDATES, SEQUENCE = 3, 6, 16  # micro-batches of one sample


@pytest.mark.parametrize("num_stages", [4])
def test_each_stage_knows_where_sequences_begin_and_counts_them_alone(
    pool: GetPool, corpus: str, one_process: OneProcess, tmp_path: Path, num_stages: int
) -> None:
    argv = without(arguments(corpus, num_stages, A), "--micro-batch-size", "--global-batch-size", "--data-path")
    argv += ["--micro-batch-size", "1", "--global-batch-size", str(A), "--dataloader-inter-document-masking"]
    argv += ["--data-path", corpus, "--data-cache-path", str(tmp_path / "cache")]
    lengths: dict[str, list[Any]] = {}

    def run(name: str, *flags: str) -> Any:
        (tmp_path / name).mkdir()
        within = partial(attention_within_sequences, str(tmp_path / name))
        if name == "emulated":
            result: Any = one_process(emulated([*argv, *flags]), within=within)
        else:
            result = pool(num_stages).run("train", argv=[*argv, *flags], within=within, count_collectives=True)
        files = sorted((tmp_path / name).glob("*.json"))
        lengths[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return result

    flush, drained = run("flush"), run("drained", *PACI, "--paci-drain-interval", "1")
    assert_same_bits(flush, drained)
    processes = run("processes", *PACI)
    assert [process.collectives for process in processes] == [{}] * num_stages, "a collective across stages"
    assert_same_run(processes, run("emulated", *PACI))

    (of_windows,) = {json.dumps(stage) for stage in lengths["flush"]}
    windows = json.loads(of_windows)
    assert [tokens for tokens, _ in windows] == [A * SEQUENCE] * UPDATES
    assert any(squares < A * SEQUENCE**2 for _, squares in windows), "no sample holds two sequences"
    assert lengths["drained"] == [windows] * num_stages
    # An earlier stage has forwarded some of the next window; all have forwarded the same by the drain at the end.
    assert lengths["processes"][-1] == windows and lengths["processes"][0] != windows
    totals = [sum(squares for _, squares in windows)] * num_stages
    assert [sum(squares for _, squares in stage) for stage in lengths["processes"]] == totals
    (emulation,) = lengths["emulated"]
    assert sum(squares for _, squares in emulation) == totals[0]
