"""Which of Megatron's optional accelerators are installed, and what to use where they are not."""

from __future__ import annotations

import argparse
import importlib.util

from paci_megatron.config import ConfigError

from . import cpu

_MISSING_BOTH = "neither Transformer Engine nor Apex is installed"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's PyTorch layers can be imported."""
    return _importable("transformer_engine") and _importable("transformer_engine.pytorch")


def has_apex() -> bool:
    """Whether NVIDIA's Apex can be imported. (The package of that name on the index has no optimizers.)"""
    return _importable("apex") and _importable("apex.optimizers")


def has_gradient_accumulation_fusion() -> bool:
    """Whether Apex's fused weight-gradient kernel can be imported."""
    return _importable("fused_weight_gradient_mlp_cuda")


def adapt_to_installed(args: argparse.Namespace) -> list[str]:
    """Replace what the command line asks of packages that are missing; returns a line for each choice.

    Megatron's defaults ask for Transformer Engine and Apex kernels and stop where there are none.
    """
    has_te = has_transformer_engine()
    if not has_te:
        if args.transformer_impl == "transformer_engine":
            args.transformer_impl = "local"
        # Megatron's own layers take these two from Apex.
        args.gradient_accumulation_fusion = args.gradient_accumulation_fusion and has_gradient_accumulation_fusion()
        args.no_persist_layer_norm = args.no_persist_layer_norm or not _importable("apex")
    why = "" if has_te else " (Transformer Engine is not installed)"
    lines = [f"layers: {args.transformer_impl}{why}"]
    if not cpu.is_active():  # there is no choice on a CPU
        lines += [_attention(args), _optimizer(args), _weight_gradients(args)]
    return lines


def check_installed(args: argparse.Namespace) -> None:
    """``ConfigError`` if the command line asks for what only a missing package can do."""
    if args.context_parallel_size > 1 and not has_transformer_engine():
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine's attention, which is not "
            "installed (and does not run on a CPU). Install transformer-engine, or remove the flag: "
            "--tensor-model-parallel-size with --sequence-parallel also splits long sequences."
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


def _weight_gradients(args: argparse.Namespace) -> str:
    if args.gradient_accumulation_fusion:
        return "weight gradients: added up by the matrix product that computes them"
    return "weight gradients: computed, then added up (gradient accumulation fusion is off, or Apex is not installed)"


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
