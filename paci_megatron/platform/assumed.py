"""Another machine than this one: what Megatron and the plugin find there, for checking a command line here.

Nothing can be computed with what is assumed. It lasts to the end of the process.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

GPU_CAPABILITY = (9, 0)
TE_VERSION = "2.9.0"

_PACKAGES = {
    "te": ("transformer_engine", "transformer_engine_torch"),
    "apex": (
        *("apex", "amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda"),
        *("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda", "scaled_softmax_cuda"),
    ),
}
NAMES = ("gpu", *_PACKAGES)
"""What can be assumed: a CUDA device, Transformer Engine, Apex with its CUDA extensions."""


def assume(names: Collection[str]) -> None:
    """Let a GPU, Transformer Engine or Apex be there. To be called before Megatron is imported."""
    from . import cpu  # which imports torch

    packages = {package for name in names for package in _PACKAGES.get(name, ())}
    if packages:
        sys.meta_path.insert(0, _Finder(packages))
    if "gpu" in names and cpu.activate():
        cpu.pose_as_gpu(GPU_CAPABILITY)


class _Hollow(ModuleType):
    """A package that has whatever is asked of it: an empty class for a name like one, and a hollow package for others."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__version__ = TE_VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made: Any = type(name, (), {}) if name[:1].isupper() else _Hollow(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Finder:
    """Finds every module of some packages, and loads a hollow one."""

    def __init__(self, packages: Collection[str]) -> None:
        self._packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if name.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]  # a loader by its methods

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """See ``importlib.abc.Loader``."""
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """See ``importlib.abc.Loader``."""
