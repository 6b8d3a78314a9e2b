"""What is used where an accelerator is missing, and that the log says so. In a process with the stand-ins for CUDA."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.platform import without_te as capabilities


def namespace(**changes: Any) -> argparse.Namespace:
    """Megatron's arguments that depend on what is installed."""
    values = {
        "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": True,
        "no_persist_layer_norm": False,
        "optimizer": "adam",
        "attention_backend": argparse.Namespace(name="auto"),
    }
    return argparse.Namespace(**{**values, **changes})


def lines_with(monkeypatch: pytest.MonkeyPatch, args: argparse.Namespace, *modules: str) -> list[str]:
    """The lines on a GPU where these modules can be imported."""
    monkeypatch.setattr(capabilities, "_importable", lambda name: name in modules)
    monkeypatch.setattr(capabilities.cpu, "is_active", lambda: False)
    return capabilities.adapt_to_installed(args)


TE = ("transformer_engine", "transformer_engine.pytorch")
APEX = ("apex", "apex.optimizers", "fused_weight_gradient_mlp_cuda")


def test_with_nothing_installed_megatrons_own_layers_and_pytorchs_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    args = namespace()
    layers, attention, optimizer, gradients = lines_with(monkeypatch, args)
    assert (args.transformer_impl, args.gradient_accumulation_fusion, args.no_persist_layer_norm) == ("local", False, True)
    assert layers == "layers: local (Transformer Engine is not installed)"
    assert "unfused" in attention
    assert "PyTorch's adam" in optimizer and "neither Transformer Engine nor Apex" in optimizer
    assert "then added up" in gradients


def test_apex_gives_the_optimizer_and_fused_weight_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    args = namespace()
    _, _, optimizer, gradients = lines_with(monkeypatch, args, *APEX)
    assert args.gradient_accumulation_fusion and not args.no_persist_layer_norm
    assert optimizer == "optimizer: Apex's fused adam"
    assert "by the matrix product" in gradients


def test_transformer_engine_gives_layers_attention_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    args = namespace()
    layers, attention, optimizer, _ = lines_with(monkeypatch, args, *TE)
    assert layers == "layers: transformer_engine" and args.transformer_impl == "transformer_engine"
    assert "--attention-backend auto" in attention and "flash-attn is not installed" in attention
    assert optimizer == "optimizer: Transformer Engine's fused adam"
    assert "flash-attn" not in lines_with(monkeypatch, namespace(), *TE, "flash_attn")[1]


def test_the_norm_left_on_the_device_is_megatrons_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.utils import local_multi_tensor_l2_norm

    from paci_megatron.plugin import loop_patches
    from paci_megatron.plugin import run as runs

    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (5, 70, 900)]
    l2_norm = loop_patches.wrap_l2_norm_impl(local_multi_tensor_l2_norm)
    monkeypatch.setattr(runs, "current", lambda: SimpleNamespace(runs_plans=True))
    norm, _ = l2_norm(1, None, [gradients], False)
    assert norm.shape == (1,)
    exact = torch.cat(gradients).double().norm()
    torch.testing.assert_close(norm[0].double(), exact, rtol=1e-6, atol=0)
    # Another's kernel, or another schedule, is left alone.
    other = loop_patches.wrap_l2_norm_impl(lambda *args: (args, None))
    assert other(1, None, [gradients], False)[0] == (1, None, [gradients], False)
