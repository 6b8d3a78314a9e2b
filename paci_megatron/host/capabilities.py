"""Which of Megatron's optional accelerators are installed, and what to use where they are not."""

from __future__ import annotations

import argparse
import importlib.util

from paci_megatron.config import ConfigError


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's PyTorch layers can be imported."""
    return _importable("transformer_engine") and _importable("transformer_engine.pytorch")


def has_gradient_accumulation_fusion() -> bool:
    """Whether Apex's fused weight-gradient kernel can be imported."""
    return _importable("fused_weight_gradient_mlp_cuda")


def adapt_to_installed(args: argparse.Namespace) -> list[str]:
    """Replace what the command line asks of packages that are missing; returns a line for each choice.

    Megatron's defaults ask for Transformer Engine and Apex kernels and stop where there are none.
    """
    if has_transformer_engine():
        return [f"layers: {args.transformer_impl}"]
    if args.transformer_impl == "transformer_engine":
        args.transformer_impl = "local"
    # Megatron's own layers take these two from Apex.
    args.gradient_accumulation_fusion = args.gradient_accumulation_fusion and has_gradient_accumulation_fusion()
    args.no_persist_layer_norm = args.no_persist_layer_norm or not _importable("apex")
    return [f"layers: {args.transformer_impl} (Transformer Engine is not installed)"]


def check_installed(args: argparse.Namespace) -> None:
    """``ConfigError`` if the command line asks for what only a missing package can do."""
    if args.context_parallel_size > 1 and not has_transformer_engine():
        raise ConfigError(
            f"--context-parallel-size {args.context_parallel_size} needs Transformer Engine's attention, which is not "
            "installed (and does not run on a CPU). Install transformer-engine, or remove the flag: "
            "--tensor-model-parallel-size with --sequence-parallel also splits long sequences."
        )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
