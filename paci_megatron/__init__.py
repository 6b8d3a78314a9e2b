"""PACI pipeline schedule for Megatron: pipeline-parallel GPT pretraining that never flushes (arXiv 2606.07881).

``install()`` adds ``--pipeline-schedule paci`` to the installed Megatron; importing this package changes nothing.
"""

from __future__ import annotations

from .config import ConfigError, PaciConfig

__version__ = "0.1.0"
__all__ = ["ConfigError", "PaciConfig", "__version__", "install", "uninstall"]


def install() -> None:
    """Add the PACI schedule to the installed Megatron, and on a machine without CUDA the CPU backend.

    Call it before the training script builds anything. Without ``--pipeline-schedule paci`` on the command line
    Megatron then behaves as before. A second call does nothing. ``RuntimeError`` with the list of differences if the
    installed Megatron is not one that the plugin fits; then nothing has been changed.
    """
    from .plugin import install as installation

    installation.install()


def uninstall() -> None:
    """Restore Megatron as it was before :func:`install`; ``RuntimeError`` if not installed."""
    from .plugin import install as installation

    installation.uninstall()
