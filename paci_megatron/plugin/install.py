"""Puts the plugin into the installed Megatron, all or nothing, and takes it out again."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from paci_megatron.platform import cpu

from .inputs import MegatronError

if TYPE_CHECKING:
    from .patch_table import PatchPoint

TESTED_VERSIONS = ("0.19.0", "0.19.2")
"""Of megatron-core, with all tests. Others are used where every function in the patch table is as expected."""

logger = logging.getLogger(__name__)

_installed: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Apply the table; see :func:`paci_megatron.install`."""
    if _installed:
        return
    on_cpu = cpu.activate()
    try:
        import megatron.core
        import megatron.training

        from .exits import wait_for_gloo_threads
        from .patch_table import PATCH_POINTS
    except ImportError as error:
        cpu.deactivate()
        raise MegatronError(
            f"the Megatron that Python finds lacks what paci-megatron needs ({error}). {_remedy()}"
        ) from error
    points = [point for point in PATCH_POINTS if not (point.gpu_only if on_cpu else point.cpu_only)]
    found = [_find(point) for point in points]
    differences = [target for target in found if isinstance(target, str)]
    version = Version(megatron.core.__version__).public  # a checkout adds its commit
    if differences:
        cpu.deactivate()
        raise MegatronError(
            f"megatron-core {version} ({os.path.dirname(megatron.core.__file__)}) is not one that paci-megatron fits:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + f"\n{_remedy()}"
        )
    first_rank = os.environ.get("RANK", "0") == "0"
    if first_rank and version not in TESTED_VERSIONS:
        from .log import print_first_rank

        print_first_rank(
            f"megatron-core {version} is none that was tested ({', '.join(TESTED_VERSIONS)}), but all {len(points)} "
            "functions that are replaced are as expected"
        )
    atexit.register(wait_for_gloo_threads)
    for point, target in zip(points, found, strict=True):
        assert not isinstance(target, str)
        owner, name, original = target
        _installed.append(target)
        setattr(owner, name, point.wrap(original))
        if first_rank:
            logger.debug("%s: %s", point, point.reason)


def uninstall() -> None:
    """Undo :func:`install`; see :func:`paci_megatron.uninstall`."""
    if not _installed:
        raise RuntimeError("paci-megatron is not installed in this process")
    from . import run
    from .exits import wait_for_gloo_threads

    atexit.unregister(wait_for_gloo_threads)
    while _installed:
        owner, name, original = _installed.pop()
        setattr(owner, name, original)
    run.set_current(None)
    cpu.deactivate()


def _remedy() -> str:
    """What to do about a Megatron that does not fit, which depends on where Python found it."""
    tested = f"megatron-core=={TESTED_VERSIONS[-1]}"
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    if spec is None or spec.origin is None or "site-packages" in spec.origin:
        return f"Install one that was tested: pip install '{tested}'"
    checkout = Path(spec.origin).parents[2]
    return (
        f"Python finds the checkout {checkout} before what is installed. Take it out of PYTHONPATH, or start elsewhere, and "
        f"{tested} from pip is used; or check out a tested release: "
        f"git -C {checkout} checkout core_v{TESTED_VERSIONS[0]}"
    )


def _find(point: PatchPoint) -> tuple[Any, str, Callable[..., Any]] | str:
    """The owner, attribute and value of ``point``, or how the installed Megatron differs from what is expected there."""
    try:
        owner: Any = importlib.import_module(point.module)
    except ImportError as error:
        return f"{point}: {error}"
    *path, name = point.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    original = getattr(owner, name, None)
    if original is None:
        return f"has no {point}, which paci-megatron replaces ({point.reason})"
    if point.parameters is not None:
        parameters = " ".join(inspect.signature(original).parameters)
        if parameters != point.parameters:
            return f"{point} takes ({parameters}), paci-megatron expects ({point.parameters})"
    return owner, name, original
