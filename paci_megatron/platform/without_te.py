"""Which of Megatron's optional accelerators are installed, and what to use where they are not."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from paci_megatron.config import ConfigError

from . import cpu


@dataclass(frozen=True, slots=True)
class _Kernel:
    """An argument of Megatron's that asks for modules which may be missing, its value without, and what happens then."""

    attribute: str
    off: Any
    flag: str
    modules: tuple[str, ...]
    package: str
    otherwise: str


_TE = ("transformer_engine", "transformer_engine.pytorch")
_SOFTMAX = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda", "scaled_softmax_cuda")
_TE_NAME = "Transformer Engine"

_KERNELS = (
    _Kernel(
        *("masked_softmax_fusion", False, "--masked-softmax-fusion", _SOFTMAX, "Apex's softmax kernels"),
        "PyTorch computes the softmax of Megatron's own attention",
    ),
    _Kernel("apply_rope_fusion", False, "--apply-rope-fusion", _TE, _TE_NAME, "PyTorch rotates"),
    _Kernel(
        *("memory_efficient_layer_norm", False, "--memory-efficient-layer-norm", ("apex",), "Apex"),
        "norms keep their inputs as usual",
    ),
    _Kernel("moe_permute_fusion", False, "--moe-permute-fusion", _TE, _TE_NAME, "tokens are permuted unfused"),
    _Kernel("moe_router_fusion", False, "--moe-router-fusion", _TE, _TE_NAME, "the router is unfused"),
    _Kernel("te_rng_tracker", False, "--te-rng-tracker", _TE, _TE_NAME, "Megatron's own tracker is used"),
    _Kernel("tp_comm_overlap", False, "--tp-comm-overlap", _TE, _TE_NAME, "tensor-parallel transfers are waited for"),
)

_MISSING_BOTH = "neither Transformer Engine nor Apex is installed"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's PyTorch layers can be imported."""
    return _importable("transformer_engine") and _importable("transformer_engine.pytorch")


def has_apex() -> bool:
    """Whether NVIDIA's Apex can be imported. (The package of that name on the index has no optimizers.)"""
    return _importable("apex") and _importable("apex.optimizers")


def adapt_to_installed(args: argparse.Namespace) -> list[str]:
    """Replace what the command line asks of packages that are missing; returns a line for each choice.

    Megatron's defaults ask for Transformer Engine and Apex kernels and stop where there are none, some only in the first
    forward.
    """
    has_te = has_transformer_engine()
    why = "" if has_te else " (Transformer Engine is not installed)"
    if not has_te and args.transformer_impl == "transformer_engine":
        args.transformer_impl = "local"
    lines = [f"layers: {args.transformer_impl}{why}"]
    missing = []
    for kernel in _KERNELS:
        value = getattr(args, kernel.attribute, kernel.off)
        if value != kernel.off and not all(map(_importable, kernel.modules)):
            setattr(args, kernel.attribute, kernel.off)
            missing.append(f"{kernel.flag} is off: it needs {kernel.package}, {kernel.otherwise}")
    local = args.transformer_impl != "transformer_engine"
    # Transformer Engine's layers have this kernel of their own; Megatron's take it from Apex, see wrap_parallel_linear_init.
    if local and args.gradient_accumulation_fusion and not has_fused_weight_gradient():
        args.gradient_accumulation_fusion = False
        missing.append(
            "--gradient-accumulation-fusion is off: it needs Apex's fused_weight_gradient_mlp_cuda, weight gradients are "
            "computed and then added up"
        )
    # The torch norms that Megatron's own layers then have know no such thing.
    rms = getattr(args, "normalization", "LayerNorm") != "LayerNorm"
    if local and (rms or not _importable("apex")):
        args.no_persist_layer_norm = True
    if not cpu.is_active():  # there is no choice on a CPU
        lines += [_attention(args), _optimizer(args)]
    return [*lines, *missing]


def has_fused_weight_gradient() -> bool:
    """Whether Apex's kernel can be imported that adds a weight's gradient up in the product that computes it."""
    return _importable("fused_weight_gradient_mlp_cuda")


def wrap_parallel_linear_init(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap the construction of Megatron's own linear layers: under Transformer Engine the output layer, and no other.

    They refuse gradient accumulation fusion, or fail in their first backward, where Apex's kernel for it is missing;
    Transformer Engine's layers have one of their own, and keep it.
    """

    @functools.wraps(original)
    def __init__(self: Any, *positional: Any, config: Any, **named: Any) -> None:
        if config.gradient_accumulation_fusion and not has_fused_weight_gradient():
            config = copy.copy(config)
            config.gradient_accumulation_fusion = False
        original(self, *positional, config=config, **named)

    return __init__


def wrap_torch_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the construction of PyTorch's norms, the only ones without Transformer Engine and Apex, which Megatron refuses
    under sequence parallelism.

    They compute the same on a part of the sequence. What is missing is the mark by which Megatron sums their gradients over
    the tensor-parallel ranks.
    """

    @functools.wraps(original)
    def __new__(cls: type, config: Any, *positional: Any, **named: Any) -> Any:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *positional, **named)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    return __new__


def check_installed(args: argparse.Namespace) -> None:
    """``ConfigError`` if the command line asks for what only a missing package can do."""
    if getattr(args, "optimizer", "adam") not in ("adam", "sgd") and not _importable("emerging_optimizers"):
        raise ConfigError(
            f"--optimizer {args.optimizer} comes from the package emerging-optimizers, which is not installed: "
            "pip install 'paci-megatron[muon]'."
        )
    if has_transformer_engine():
        return
    if args.context_parallel_size > 1:
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine's attention, which is not "
            "installed (and does not run on a CPU). Install transformer-engine, or remove the flag: "
            "--tensor-model-parallel-size with --sequence-parallel also splits long sequences."
        )
    if getattr(args, "use_precision_aware_optimizer", False) and not args.optimizer_cpu_offload:
        raise ConfigError(
            "--use-precision-aware-optimizer needs Transformer Engine's FusedAdam, which is not installed. Install "
            "transformer-engine, or remove the flag: the optimizer's states are then in fp32."
        )


def _attention(args: argparse.Namespace) -> str:
    if args.transformer_impl == "local":
        return "attention: Megatron's own, unfused (flash attention comes with Transformer Engine's layers)"
    flash = "" if _importable("flash_attn") else "; flash-attn is not installed, so cuDNN's or Transformer Engine's kernels"
    return f"attention: Transformer Engine's, --attention-backend {args.attention_backend.name}{flash}"


def _optimizer(args: argparse.Namespace) -> str:
    """What Megatron takes for Adam and SGD, in the order in which it looks."""
    if has_transformer_engine():
        return f"optimizer: Transformer Engine's fused {args.optimizer}"
    if has_apex():
        return f"optimizer: Apex's fused {args.optimizer}"
    return f"optimizer: PyTorch's {args.optimizer}, a few kernels for all parameters ({_MISSING_BOTH})"


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
