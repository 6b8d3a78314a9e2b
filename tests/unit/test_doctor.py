"""What ``paci-megatron doctor`` says of a machine, and that it can say no."""

from __future__ import annotations

import pytest

from paci_megatron.cli import doctor


@pytest.mark.parametrize(("flush", "drained", "status"), [([1.0, 2.0], [1.0, 2.0], 0), ([1.0], [1.5], 1), ([], [], 1)])
def test_a_training_that_is_not_flush_fails(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flush: list[float],
    drained: list[float],
    status: int,
) -> None:
    monkeypatch.setattr(doctor, "_losses", lambda metrics, *options: drained if options else flush)
    monkeypatch.setattr(doctor, "_checks", lambda trains: [("training", doctor._training)])
    assert doctor.main([]) == status
    assert capsys.readouterr().out.startswith("FAIL  training" if status else "PASS  training")


@pytest.mark.slow
def test_this_machine_trains_as_flush() -> None:
    assert "8 iterations by two processes" in doctor._training()
