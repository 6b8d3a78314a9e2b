"""The watchdog speaks before the backend's own, and also of a rank that is outside its plans."""

from __future__ import annotations

import argparse
import io
import math
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.plugin.watchdog import Watchdog, transfer_timeout_s


def seconds(given: float | None, minutes: int = 10, after_init: int | None = None) -> float:
    return transfer_timeout_s(
        argparse.Namespace(
            paci_transfer_timeout=given,
            distributed_timeout_minutes=minutes,
            distributed_timeout_seconds_after_init=after_init,
        )
    )


def test_the_default_is_shorter_than_the_groups_time_out() -> None:
    assert seconds(None) == 450 and seconds(None, minutes=2) == 90 and seconds(None, after_init=40) == 30
    assert seconds(599.0) == 599 and seconds(None, minutes=1, after_init=600) == 45


@pytest.mark.parametrize(
    ("given", "options", "flag"),
    [
        (600.0, {}, "--distributed-timeout-minutes 10"),
        (700.0, {"minutes": 11}, "--distributed-timeout-minutes 11"),
        (60.0, {"after_init": 60}, "--distributed-timeout-seconds-after-init 60"),
    ],
)
def test_a_time_out_that_the_backends_own_would_come_before_is_refused(
    given: float, options: dict[str, int], flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"--paci-transfer-timeout {given:g} with {flag}: .* Give less than"):
        seconds(given, **options)
    assert seconds(math.nextafter(given, 0) - 100.0 if given > 100 else 59.0, **options)


def watched(run: Any, timeout_s: float, until: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of ``run`` until that includes ``until``, 5 seconds at most."""
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"the process ends with {status}"))
    output = io.StringIO()
    watchdog = Watchdog(run, timeout_s, rank=3, output=output)
    watchdog.start()
    end_s = time.monotonic() + 5
    while until not in output.getvalue() and time.monotonic() < end_s:
        time.sleep(0.02)
    time.sleep(3 * timeout_s)
    watchdog.stop()
    return output.getvalue()


def test_a_rank_outside_its_plans_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(plans=[], stages=[SimpleNamespace(stage_index=2)], since_s=time.monotonic())
    said = watched(run, 0.1, "outside the plan", monkeypatch)
    assert said == "paci-megatron: rank 3, stage 2: drained: outside the plan for 0.1 s, and other stages may wait for it\n"
