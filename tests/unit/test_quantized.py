"""Quantised weights: kept those of the newest weights, and what of the flags is switched off, refused or said."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.config import ConfigError, PaciConfig
from paci_megatron.flags import gather_in_the_step, not_verified
from paci_megatron.plugin import loop_patches
from paci_megatron.plugin import run as runs
from paci_megatron.runtime.quantized import QuantizedCopies
from tests.support.quantized import Copy, quantized
from tests.unit.test_config import namespace


def test_copies_are_written_again_in_place_and_those_that_cannot_be_are_dropped() -> None:
    linear = torch.nn.Linear(3, 3)
    copy = Copy(linear.weight)
    held_by_a_backward = copy.data
    linear._fp8_workspaces = {"weight": copy, "several experts": object()}  # type: ignore[assignment]
    copies = QuantizedCopies(torch.nn.Sequential(linear, torch.nn.ReLU()))
    assert copies.exist()
    with torch.no_grad():
        linear.weight.add_(1)
    assert not torch.equal(held_by_a_backward, quantized(linear.weight))
    copies.renew()
    assert torch.equal(held_by_a_backward, quantized(linear.weight))
    assert linear._fp8_workspaces == {"weight": copy}


def test_a_model_without_copies_has_none_to_renew() -> None:
    assert not QuantizedCopies(torch.nn.Linear(3, 3)).exist()


@pytest.mark.parametrize("flag", ["fp8", "fp4"])
def test_older_versions_of_quantised_weights_are_refused(flag: str) -> None:
    PaciConfig.from_args(namespace(**{flag: "hybrid"}))
    with pytest.raises(
        ConfigError, match=f"--paci-weight-policy stash with --{flag}-format hybrid: .*Remove --{flag}-format"
    ):
        PaciConfig.from_args(namespace(**{flag: "hybrid", "paci_weight_policy": "stash"}))


def test_the_gather_in_the_gradients_memory_is_waited_for() -> None:
    for changes, cause in (
        ({"reuse_grad_buf_for_mxfp8_param_ag": True}, "--reuse-grad-buf"),
        ({"optimizer": "dist_muon"}, "--optimizer dist_muon"),
    ):
        args = argparse.Namespace(**{"optimizer": "adam", "overlap_param_gather": True, **changes})
        (line,) = gather_in_the_step(args)
        assert not args.overlap_param_gather and line.startswith(f"--overlap-param-gather is off under paci: with {cause}")
        assert gather_in_the_step(args) == []


def test_what_no_machine_has_run_is_said() -> None:
    assert not_verified(argparse.Namespace(fp8=None, fp4=None)) == []
    (line,) = not_verified(argparse.Namespace(fp8="hybrid", fp4=None))
    assert line.startswith("--fp8-format hybrid under paci is not verified on hardware") and "--only fp8" in line


def test_the_indexers_loss_is_summed_over_the_stages_at_drains_as_the_mean_since_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def original(*given: Any) -> None:
        calls.append(given)

    track = loop_patches.wrap_track_indexer_metrics(original)
    interval: dict[str, Any] = {}
    for drained_after in (0, 0, 3):
        run = SimpleNamespace(runs_plans=True, drained_iterations=lambda after=drained_after: after)
        monkeypatch.setattr(runs, "current", lambda run=run: run)
        track(0.5, 7, "writer", None, total_loss_dict=interval)
    assert calls == [(0.5 / 3, 7, "writer", None)]
    monkeypatch.setattr(runs, "current", lambda: None)
    track(0.5, 7, "writer", None, total_loss_dict=interval)
    assert calls[1] == (0.5, 7, "writer", None, interval, False), "Megatron's own schedule: as ever"
