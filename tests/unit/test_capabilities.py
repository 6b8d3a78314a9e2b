"""What is used where an accelerator is missing, and that the log says so. In a process with the stand-ins for CUDA."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.config import ConfigError
from paci_megatron.platform import without_te as capabilities


@pytest.fixture
def stand_ins() -> Iterator[None]:
    """The stand-ins for CUDA, which Megatron's layers ask for their device."""
    capabilities.cpu.activate()
    yield
    capabilities.cpu.deactivate()


def namespace(**changes: Any) -> argparse.Namespace:
    """Megatron's arguments that depend on what is installed, all on."""
    values = {
        "transformer_impl": "transformer_engine",
        "gradient_accumulation_fusion": True,
        "masked_softmax_fusion": True,
        "no_persist_layer_norm": False,
        "apply_rope_fusion": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "memory_efficient_layer_norm": True,
        "te_rng_tracker": True,
        "tp_comm_overlap": True,
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
APEX_PYTHON = ("apex", "apex.optimizers")  # built without its CUDA extensions
SOFTMAX = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda", "scaled_softmax_cuda")
APEX = (*APEX_PYTHON, "fused_weight_gradient_mlp_cuda", *SOFTMAX)

FROM_TE = {"apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion", "te_rng_tracker", "tp_comm_overlap"}


@pytest.mark.parametrize(
    ("modules", "layers", "off"),
    [
        ((), "local", {"gradient_accumulation_fusion", "masked_softmax_fusion", "memory_efficient_layer_norm"} | FROM_TE),
        (TE, "transformer_engine", {"masked_softmax_fusion", "memory_efficient_layer_norm"}),
        (APEX, "local", FROM_TE),
        ((*TE, *APEX), "transformer_engine", set()),
        (APEX_PYTHON, "local", {"gradient_accumulation_fusion", "masked_softmax_fusion"} | FROM_TE),
        ((*TE, *APEX_PYTHON), "transformer_engine", {"masked_softmax_fusion"}),
    ],
    ids=["none", "te", "apex", "both", "apex-without-extensions", "te-and-apex-without-extensions"],
)
def test_every_flag_that_would_need_what_is_missing_is_off_with_a_line_each(
    monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], layers: str, off: set[str]
) -> None:
    args, asked = namespace(), namespace()
    lines = lines_with(monkeypatch, args, *modules)
    assert args.transformer_impl == layers
    changed = {name for name, value in vars(asked).items() if value is True and getattr(args, name) is False}
    assert changed == off
    assert {line.split(" is off: ")[0] for line in lines if " is off: " in line} == {
        f"--{name.replace('_', '-')}" for name in off
    }
    assert args.no_persist_layer_norm == (layers == "local" and "apex" not in modules)


def test_local_layers_and_rms_norm_have_no_persistent_norm_whatever_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for modules in (TE, (*TE, *APEX)):
        args = namespace(transformer_impl="local", normalization="RMSNorm")
        lines_with(monkeypatch, args, *modules)
        assert args.no_persist_layer_norm


@pytest.mark.parametrize("modules", [(), TE, APEX_PYTHON])
def test_megatrons_softmax_runs_in_bf16_at_lengths_for_which_it_has_a_kernel(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...]
) -> None:
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.transformer.enums import AttnMaskType

    def softmax(fused: bool) -> torch.Tensor:
        layer = FusedScaleMaskSoftmax(
            input_in_fp16=False,
            input_in_bf16=True,
            attn_mask_type=AttnMaskType.causal,
            scaled_masked_softmax_fusion=fused,
            mask_func=lambda scores, mask: scores.masked_fill(mask, -10000.0),
            softmax_in_fp32=True,
            scale=None,
        )
        return layer(torch.zeros(1, 4, 32, 32, dtype=torch.bfloat16), None)

    args = namespace()
    lines_with(monkeypatch, args, *modules)
    assert softmax(args.masked_softmax_fusion)[0, 0, 0, 0] == 1
    with pytest.raises(ImportError, match="scaled_masked_softmax_cuda"):
        softmax(fused=True)


@pytest.mark.parametrize("layer", ["ColumnParallelLinear", "RowParallelLinear"])
def test_megatrons_own_linear_layers_do_without_apexs_kernel_under_transformer_engine(stand_ins: None, layer: str) -> None:
    """The output layer of a model whose other layers are Transformer Engine's."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    config = ModelParallelConfig(gradient_accumulation_fusion=True, perform_initialization=False, params_dtype=torch.float32)
    kind = getattr(layers, layer)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    more = {"input_is_parallel": True} if layer == "RowParallelLinear" else {}

    def built(init: Any) -> Any:
        made = kind.__new__(kind)
        common: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "skip_bias_add": True}
        init(made, 4, 8, **common, tp_group=group, **more)
        return made

    original = getattr(kind.__init__, "__wrapped__", kind.__init__)
    assert not built(capabilities.wrap_parallel_linear_init(original)).gradient_accumulation_fusion
    assert config.gradient_accumulation_fusion, "Transformer Engine's layers keep theirs"
    if layer == "ColumnParallelLinear":
        with pytest.raises(RuntimeError, match="fused_weight_gradient_mlp_cuda"):
            built(original)


def test_what_only_a_missing_package_can_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "_importable", lambda name: name in APEX)
    plain = {"context_parallel_size": 1, "use_precision_aware_optimizer": False, "optimizer_cpu_offload": False}
    capabilities.check_installed(argparse.Namespace(**plain))
    with pytest.raises(ConfigError, match="--use-precision-aware-optimizer needs Transformer Engine"):
        capabilities.check_installed(argparse.Namespace(**{**plain, "use_precision_aware_optimizer": True}))


def test_transformer_engine_gives_layers_attention_and_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    args = namespace()
    layers, attention, optimizer, *_ = lines_with(monkeypatch, args, *TE)
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


def test_an_optimizer_from_a_package_that_is_missing_is_refused_with_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = argparse.Namespace(optimizer="muon", context_parallel_size=1)
    monkeypatch.setattr(capabilities, "_importable", lambda name: name in TE)
    with pytest.raises(ConfigError, match=r"--optimizer muon comes from .* pip install 'paci-megatron\[muon\]'"):
        capabilities.check_installed(args)
    monkeypatch.setattr(capabilities, "_importable", lambda name: name in (*TE, "emerging_optimizers"))
    capabilities.check_installed(args)
