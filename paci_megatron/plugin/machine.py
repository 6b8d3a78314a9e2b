"""What this machine has for training under PACI, and what to type for what it lacks; ``paci-megatron doctor`` prints it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

EXTRAS = {
    "data": ("datasets", "pyarrow", "tqdm"),
    "eval": ("pyarrow", "tqdm"),
    "plot": ("matplotlib", "plotly"),
    "tensorboard": ("tensorboard",),
    "muon": ("emerging_optimizers",),
}
"""The modules that each optional extra of this package installs, of those which only some commands or flags need."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check says; only FAIL means that training will not work."""

    name: str
    status: Literal["PASS", "FAIL", "SKIP"]
    said: str


class _Skip(Exception):
    """Nothing to check here, or an option that is missing; the message says what follows from it."""


def examine(trains: bool) -> Iterator[Finding]:
    """Every check in turn; the short training, which takes most of the time, only if ``trains``."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python", platform.python_version),
        ("PyTorch", _torch),
        ("CUDA devices", _devices),
        ("NCCL", _nccl),
        ("Megatron", _megatron),
        ("Transformer Engine", _transformer_engine),
        ("Apex", _apex),
        ("kernels", _kernels),
        *((f"[{extra}]", lambda extra=extra: _extra(extra)) for extra in EXTRAS),
        *([("training", _training)] if trains else []),
        *([("GPU check", _gpu_check)] if num_gpus() else []),
    ]
    fits = True
    with _compilers_folder():
        for name, check in checks:
            if not fits and check in (_kernels, _training):
                yield Finding(name, "SKIP", "not without a Megatron that fits")
                continue
            finding = _outcome(name, check)
            fits = fits and not (finding.status == "FAIL" and check in (_torch, _megatron))
            yield finding


@contextlib.contextmanager
def _compilers_folder() -> Iterator[None]:
    """torch.compile's cache, which importing Megatron begins, is in a temporary folder inside."""
    before = os.environ.get(_CACHE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            os.environ.pop(_CACHE)
            if before is not None:
                os.environ[_CACHE] = before


def num_gpus() -> int:
    """CUDA devices that PyTorch finds; none where it is missing."""
    try:
        import torch

        from paci_megatron.platform import cpu
    except ImportError:
        return 0
    return 0 if cpu.is_active() else torch.cuda.device_count()


def _outcome(name: str, check: Callable[[], str]) -> Finding:
    logging.disable(logging.WARNING)  # the answer is the finding; optional packages say much when they are imported
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return Finding(name, "PASS", check())
    except _Skip as reason:
        return Finding(name, "SKIP", str(reason))
    # Whatever an installation that is broken raises is what is to be said of it.
    except Exception as error:
        return Finding(name, "FAIL", str(error) or type(error).__name__)
    finally:
        logging.disable(logging.NOTSET)


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'}"


def _devices() -> str:
    import torch

    if not (count := num_gpus()):
        raise _Skip("none: everything runs on the CPU over gloo")
    for device in range(count):
        # A build of PyTorch without kernels for this GPU shows only when one is started.
        if torch.ones(2, device=f"cuda:{device}").sum().item() != 2:
            raise RuntimeError(f"cuda:{device} computes 1 + 1 wrongly")
    return f"{count}: {', '.join(dict.fromkeys(map(torch.cuda.get_device_name, range(count))))}"


def _nccl() -> str:
    import torch
    import torch.distributed as dist

    if not num_gpus():
        raise _Skip("needs a CUDA device")
    if not dist.is_nccl_available():
        raise RuntimeError(
            "this PyTorch is built without NCCL, over which stages on GPUs talk: install a CUDA build of torch"
        )
    return ".".join(map(str, torch.cuda.nccl.version()))


def _megatron() -> str:
    from .install import TESTED_VERSIONS, install

    install()
    import megatron.core

    version = Version(megatron.core.__version__).public  # Megatron adds the commit of the folder that it is started in
    return f"{version}, all functions that are replaced are as expected (tested: {', '.join(TESTED_VERSIONS)})"


def _transformer_engine() -> str:
    from paci_megatron.platform.without_te import has_transformer_engine

    if not has_transformer_engine():
        raise _Skip("not installed: Megatron's own layers are used; on GPUs: pip install 'paci-megatron[gpu]'")
    return "installed"


def _apex() -> str:
    from paci_megatron.platform.without_te import has_apex, has_fused_weight_gradient

    if not has_apex():
        raise _Skip("not installed: nothing needs it (it is built from NVIDIA's sources, the index has another apex)")
    return f"installed, {'with' if has_fused_weight_gradient() else 'without'} its fused weight gradients"


def _kernels() -> str:
    from .check import default_kernels

    return "; ".join(default_kernels())


def _extra(extra: str) -> str:
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise _Skip(f"without {', '.join(missing)}: pip install 'paci-megatron[{extra}]'")
    return "installed"


def _training() -> str:
    from .trial import NUM_STAGES, verified_training

    return verified_training(on_gpus=num_gpus() >= NUM_STAGES)


def _gpu_check() -> str:
    multi = " --multi" if num_gpus() > 1 else ""
    raise _Skip(
        f"more is checked on these GPUs by a checkout of paci-megatron, in minutes: python tools/gpu_check.py{multi}"
    )
