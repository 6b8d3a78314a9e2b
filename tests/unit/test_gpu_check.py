"""The command that checks a machine: its table, JSON and exit status, with checks of its own making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.checks import many_gpus, one_device
from lab.checks.bench import CPU_SIZES, GPU_SIZES, Bench, StepError, tail
from lab.checks.outcome import (
    Check,
    Measured,
    Outcome,
    SkipCheck,
    Status,
    exit_status,
    perform,
    table,
    write_json,
)
from tools import gpu_check


def holds() -> Measured:
    return Measured(True, "2.0 % slower", {"overhead": 0.02})


def fails() -> Measured:
    return Measured(False, "3.0 % slower", {"overhead": 0.03})


def breaks() -> Measured:
    raise StepError("training failed with status 1; see x.log\nTraceback\nRuntimeError: out of memory")


def says_nothing() -> Measured:
    raise SkipCheck("needs two GPUs")


def outcomes(*runs: Any) -> list[Outcome]:
    return [perform(Check(run.__name__, "at most 2 %", run)) for run in runs]


def test_each_ending_has_its_status_and_ends_no_other() -> None:
    statuses = [outcome.status for outcome in outcomes(holds, breaks, fails, says_nothing, holds)]
    assert statuses == [Status.PASS, Status.FAIL, Status.FAIL, Status.SKIP, Status.PASS]


def test_an_interrupt_ends_the_checks() -> None:
    def interrupted() -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(Check("interrupted", "", interrupted))


def test_the_exit_status_is_1_only_if_a_check_failed() -> None:
    assert exit_status(outcomes(holds, says_nothing)) == 0
    assert exit_status(outcomes(holds, fails)) == 1
    assert exit_status(outcomes(breaks, holds)) == 1


def test_the_table_has_the_number_the_bound_and_the_reasons() -> None:
    lines = table(outcomes(holds, breaks, says_nothing)).splitlines()
    assert lines[0] == "PASS  holds         2.0 % slower  [at most 2 %]"
    assert lines[1].startswith("FAIL  breaks        StepError: training failed with status 1; see x.log")
    assert lines[2:4] == ["      Traceback", "      RuntimeError: out of memory"]
    assert lines[4] == "SKIP  says_nothing  needs two GPUs"
    assert lines[5] == "1 PASS, 1 FAIL, 1 SKIP"


def test_the_json_is_for_programs(tmp_path: Path) -> None:
    path = tmp_path / "gpu_check.json"
    write_json(path, {"gpus": ["H100"]}, outcomes(holds, fails))
    content = json.loads(path.read_text())
    assert content["machine"] == {"gpus": ["H100"]} and content["passed"] is False
    assert [check["status"] for check in content["checks"]] == ["PASS", "FAIL"]
    assert content["checks"][0]["figures"] == {"overhead": 0.02}
    assert set(content["checks"][0]) >= {"name", "measured", "bound", "seconds", "details"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("argv", [[], ["--multi"]])
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert gpu_check.main(argv) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.missing_modules() == []
    assert gpu_check.missing_modules(("json", "no_such_package", "no_such.module")) == ["no_such_package", "no_such.module"]
    monkeypatch.setattr(gpu_check, "missing_modules", lambda: ["sentencepiece"])
    assert gpu_check.main(["--cpu"]) == 2
    assert "cannot import sentencepiece" in capsys.readouterr().err


def test_a_command_that_fails_shows_the_end_of_its_log_and_is_run_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, CPU_SIZES, on_gpu=False)
    with pytest.raises(StepError, match=r"broken failed with status 3; see .*broken.log") as caught:
        bench.command("broken", ["-c", "print('the reason'); raise SystemExit(3)"])
    assert "the reason" in str(caught.value)
    # Of processes that torchrun started, the end of what they said, not of what it says of them.
    (tmp_path / "torchrun.log").write_text(
        "RuntimeError: the reason\nE1 api.py] failed (exitcode: 1) local_rank: 0\n" + 50 * "x\n"
    )
    assert tail(tmp_path / "torchrun.log") == ["RuntimeError: the reason"]
    with pytest.raises(StepError, match="took longer than 1 s"):
        bench.command("endless", ["-c", "import time; time.sleep(60)"], timeout_s=1)


@pytest.mark.parametrize("sizes", [CPU_SIZES, GPU_SIZES])
def test_layers_can_be_divided_among_stages(sizes: Any) -> None:
    assert sizes.num_layers % sizes.emulated_stages == sizes.num_layers % sizes.linked_stages == 0
    assert sizes.compared < sizes.updates


def test_losses_are_compared_exactly_or_to_a_tolerance() -> None:
    assert one_device._compared([1.0, 2.0], [1.0, 2.0], tolerance=0.0) == (True, "2 losses equal in every bit")
    assert not one_device._compared([1.0, 2.0], [1.0, 2.000001], tolerance=0.0)[0]
    assert one_device._compared([1.0, 2.0], [1.0, 2.01], tolerance=0.01)[0]
    assert not one_device._compared([1.0], [1.0, 2.0], tolerance=1.0)[0]
    assert not one_device._compared([], [], tolerance=1.0)[0]
    assert not one_device._compared([1.0], [float("nan")], tolerance=1.0)[0]


def test_throughput_is_judged_by_the_limit() -> None:
    def rows(speedup: float) -> list[dict[str, Any]]:
        paci = {"schedule": "paci", "tokens_per_second": 150.0, "speedup_vs_flush": speedup, "limit_vs_flush": 1.875}
        return [{"schedule": "1f1b", "tokens_per_second": 100.0}, paci]

    assert many_gpus.judged(rows(1.8)).holds and "1.800 of 1.875 (96%)" in many_gpus.judged(rows(1.8)).text
    assert not many_gpus.judged(rows(1.5)).holds


@pytest.mark.slow
def test_all_checks_in_small_on_a_cpu(tmp_path: Path) -> None:
    assert gpu_check.main(["--cpu", "--multi", "--output", str(tmp_path)]) == 0
    checks = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    by_status = [[check["name"] for check in checks if check["status"] == status] for status in Status]
    assert len(by_status[0]) >= 5 and not by_status[1]
    assert all(check["measured"] for check in checks)


def test_peak_memory_allows_what_transfers_hold_and_no_more() -> None:
    transfers = one_device.transfers_bytes(GPU_SIZES)
    assert transfers == (2 * 2 + 2 + 1) * 512 * 4 * 768 * 2, "sends, activations and a gradient posted, in bf16"
    flush = [100 * transfers] * 2
    assert one_device._memory(flush, [size + transfers for size in flush], transfers).holds
    assert not one_device._memory(flush, [flush[0], flush[1] + 3 * transfers], transfers).holds
    assert not one_device._memory(flush, [flush[0], flush[1] - 2 * transfers], transfers).holds
    assert "transfers may hold 21.0 MiB" in one_device._memory(flush, flush, transfers).text


def test_words_that_no_check_has_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--cpu", "--output", str(tmp_path), "--only", "throughputt"]) == 2
    error = capsys.readouterr().err
    assert "--only throughputt: no check has these words" in error and "activations of PACI against flush" in error
    assert not (tmp_path / "gpu_check.json").exists()
