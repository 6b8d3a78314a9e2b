"""install() and uninstall(): all or nothing, and nothing left behind. In processes of their own: they change Megatron."""

from __future__ import annotations

from tests.support.interpreter import run

SNAPSHOT = """
import torch, paci_megatron
from paci_megatron.plugin import install as patches
from paci_megatron.platform import cpu
had_cuda = torch.cuda.is_available()
def snapshot():
    found = [getattr(owner, name) for owner, name, _ in patches._installed]
    return found + [torch.cuda.current_device, torch.cuda.manual_seed, torch.nn.Module.cuda, torch.cuda.Stream]
"""


def test_install_replaces_every_target_and_uninstall_restores_all() -> None:
    run(
        SNAPSHOT
        + """
import importlib
cpu.activate()
from paci_megatron.plugin.patch_table import PATCH_POINTS
cpu.deactivate()
points = [p for p in PATCH_POINTS if not (p.cpu_only if had_cuda else p.gpu_only)]
def values():
    out = []
    for p in points:
        owner = importlib.import_module(p.module)
        for part in p.name.split("."):
            owner = getattr(owner, part)
        out.append(owner)
    return out + [torch.cuda.current_device, torch.cuda.manual_seed, torch.nn.Module.cuda, torch.cuda.Stream]
cpu.activate()
before = values()
cpu.deactivate()
untouched = values()
paci_megatron.install()
during = values()
assert all(a is not b for a, b in zip(before[: len(points)], during))
paci_megatron.install()
assert all(a is b for a, b in zip(during, values())), "installed twice is installed once"
paci_megatron.uninstall()
assert all(a is b for a, b in zip(untouched, values()))
assert had_cuda or not cpu.is_active()
try:
    paci_megatron.uninstall()
    raise SystemExit("a second uninstall was accepted")
except RuntimeError as error:
    assert "not installed" in str(error)
paci_megatron.install()
"""
    )


def test_a_changed_signature_is_refused_before_anything_is_touched() -> None:
    run(
        SNAPSHOT
        + """
cpu.activate()
import megatron.training.training as training
def train_step(forward_step_func, data_iterator): ...
training.train_step = train_step
others = training.setup_model_and_optimizer, training.training_log
cpu.deactivate()
try:
    paci_megatron.install()
    raise SystemExit("accepted")
except RuntimeError as error:
    message = str(error)
assert "megatron.training.training.train_step" in message and "forward_step_func data_iterator)" in message, message
assert training.train_step is train_step
assert (training.setup_model_and_optimizer, training.training_log) == others
assert not cpu.is_active() and not patches._installed
"""
    )


def test_every_difference_is_told_at_once_and_what_is_missing() -> None:
    run(
        SNAPSHOT
        + """
cpu.activate()
import megatron.training.training as training
del training.evaluate
training.maybe_finalize_async_save = lambda blocking: None
cpu.deactivate()
try:
    paci_megatron.install()
    raise SystemExit("accepted")
except RuntimeError as error:
    assert "has no megatron.training.training.evaluate" in str(error), error
    assert "maybe_finalize_async_save takes (blocking), paci-megatron expects (blocking terminate)" in str(error), error
    assert "megatron-core==0.19.2" in str(error), error  # from pip, or in the place of the checkout
"""
    )


def test_a_version_that_was_not_tested_runs_with_a_line_that_says_so_if_it_fits() -> None:
    code = """
from paci_megatron.platform import cpu
cpu.activate()
import megatron.core, paci_megatron
megatron.core.__version__ = {version!r}
paci_megatron.install()
"""
    assert "megatron-core 0.20.0 is none that was tested" in run(code.format(version="0.20.0"))
    assert "tested" not in run(code.format(version="0.19.2"))


def test_a_user_who_asks_for_it_is_told_each_patch_point() -> None:
    install = "import paci_megatron; paci_megatron.install()"
    told = run(f"import logging; logging.basicConfig(level=logging.DEBUG, force=True); {install}")
    quiet = run(install)
    from paci_megatron.plugin.patch_table import PATCH_POINTS

    for point in PATCH_POINTS:
        assert f"{point}: {point.reason}" in told or point.cpu_only or point.gpu_only
        assert f"{point}: " not in quiet


def test_patch_points_for_gpus_are_in_the_installed_megatron_too() -> None:
    run(
        """
from paci_megatron.platform import cpu
cpu.activate()
from paci_megatron.plugin import install
from paci_megatron.plugin.patch_table import PATCH_POINTS
points = [point for point in PATCH_POINTS if point.gpu_only]
assert points and all(callable(install._find(point)[2]) for point in points)
"""
    )


def test_the_schedule_has_the_signature_of_megatrons_pipelining_functions() -> None:
    import inspect

    from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

    from paci_megatron.plugin.train_step import forward_backward_pipelining_paci

    def parameters(function: object) -> list[tuple[str, object, object]]:
        signature = inspect.signature(function)  # type: ignore[arg-type]
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(forward_backward_pipelining_paci) == parameters(forward_backward_pipelining_without_interleaving)


def test_the_help_prints_megatrons_texts_whatever_percent_signs_they_have() -> None:
    run(
        """
import argparse, paci_megatron
paci_megatron.install()
from megatron.training import arguments
from paci_megatron.plugin.setup_patches import wrap_add_megatron_arguments
assert "--paci-strict" in arguments.add_megatron_arguments(argparse.ArgumentParser()).format_help()
other = argparse.ArgumentParser()
other.add_argument("--share", default=3, help="50%% and 10% of %(default)s")
assert "50% and 10% of 3" in wrap_add_megatron_arguments(lambda parser: parser)(other).format_help()
"""
    )
