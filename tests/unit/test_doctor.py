"""What ``paci-megatron doctor`` says of a machine, and that it can say no."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.processes import ROOT
from paci_megatron.cli import doctor
from paci_megatron.platform import cpu, without_te
from paci_megatron.plugin import check, install, machine, trial

TE = ("transformer_engine", "transformer_engine.pytorch")
APEX = ("apex", "apex.optimizers")
FUSED = "fused_weight_gradient_mlp_cuda"
ALL_EXTRAS = {module for modules in machine.EXTRAS.values() for module in modules}


@pytest.fixture(autouse=True)
def fitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU machine whose Megatron fits, where nothing is trained."""
    monkeypatch.setattr(install, "install", lambda: None)
    monkeypatch.setattr(check, "default_kernels", lambda: ["layers: local", "optimizer: PyTorch's adam"])
    monkeypatch.setattr(trial, "verified_training", lambda on_gpus: f"trained, {on_gpus=}")
    monkeypatch.setattr(machine, "num_gpus", lambda: 0)


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, nccl: bool = True) -> None:
    monkeypatch.setattr(machine, "num_gpus", lambda: count)
    monkeypatch.setattr(torch, "ones", lambda size, device: torch.full((size,), 1.0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)


def with_modules(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    monkeypatch.setattr(without_te, "_importable", lambda name: name in modules)
    spec = ModuleSpec("found", None)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec if name in modules else None)


def found(trains: bool = True) -> dict[str, tuple[str, str]]:
    return {finding.name: (finding.status, finding.said) for finding in machine.examine(trains)}


@pytest.mark.parametrize(
    ("modules", "te", "apex"),
    [
        ((), "SKIP", "SKIP"),
        (TE, "PASS", "SKIP"),
        (APEX, "SKIP", "without its fused weight gradients"),
        ((*APEX, FUSED), "SKIP", "with its fused weight gradients"),
        ((*TE, *APEX, FUSED), "PASS", "with its fused weight gradients"),
    ],
    ids=["none", "te", "apex-without-extensions", "apex", "both"],
)
def test_what_is_missing_is_no_failure_and_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], te: str, apex: str
) -> None:
    with_modules(monkeypatch, *modules)
    said = found()
    assert said["Transformer Engine"][0] == te
    assert (te == "PASS") != said["Transformer Engine"][1].endswith("pip install 'paci-megatron[gpu]'")
    if apex == "SKIP":
        assert said["Apex"][0] == "SKIP" and "built from NVIDIA's sources" in said["Apex"][1]
    else:
        assert said["Apex"] == ("PASS", f"installed, {apex}")
    assert said["kernels"] == ("PASS", "layers: local; optimizer: PyTorch's adam")
    assert "FAIL" not in {status for status, _ in said.values()}


@pytest.mark.parametrize("missing", [*sorted(ALL_EXTRAS), "pyarrow tqdm", ""])
def test_each_extra_that_lacks_a_module_names_it_and_the_line_to_type(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    with_modules(monkeypatch, *(ALL_EXTRAS - set(missing.split())))
    said = found()
    for extra, modules in machine.EXTRAS.items():
        lacking = ", ".join(module for module in modules if module in missing.split())
        remedy = ("SKIP", f"without {lacking}: pip install 'paci-megatron[{extra}]'")
        assert said[f"[{extra}]"] == (remedy if lacking else ("PASS", "installed"))


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {extra: [line.partition(">")[0].replace("-", "_") for line in lines] for extra, lines in extras.items()}
    assert {extra: tuple(packages[extra]) for extra in packages.keys() - {"gpu", "dev", "docs"}} == machine.EXTRAS


@pytest.mark.parametrize("count", [0, 1, 2, 8])
def test_gpus_are_named_and_two_of_them_train_over_nccl(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    if count:
        with_gpus(monkeypatch, count)
    said = found()
    if count:
        assert said["CUDA devices"] == ("PASS", f"{count}: H100") and said["NCCL"] == ("PASS", "2.27.5")
        assert said["GPU check"][0] == "SKIP" and "python tools/gpu_check.py" in said["GPU check"][1]
        assert said["GPU check"][1].endswith(" --multi") == (count > 1)
    else:
        assert said["CUDA devices"][0] == said["NCCL"][0] == "SKIP" and "GPU check" not in said
    assert said["training"] == ("PASS", f"trained, on_gpus={count > 1}")
    assert "training" not in found(trains=False)


def test_gpus_that_cannot_be_used_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 1, nccl=False)

    def no_kernel(size: int, device: str) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch, "ones", no_kernel)
    said = found()
    assert said["CUDA devices"] == ("FAIL", "no kernel image is available")
    assert said["NCCL"][0] == "FAIL" and "install a CUDA build of torch" in said["NCCL"][1]


def test_a_megatron_that_does_not_fit_is_a_failure_with_its_differences() -> None:
    """In a process of its own: the check installs the plugin."""
    code = (
        "import megatron.training.training as t\n"
        "t.train_step = lambda surprise: None\n"
        "from paci_megatron.cli import doctor\n"
        "assert doctor.main([]) == 1\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "FAIL  Megatron " in done.stdout and "train_step takes (surprise), paci-megatron expects (" in done.stdout
    assert "pip install 'megatron-core==" in done.stdout
    for name in ("kernels", "training"):
        assert f"SKIP  {name:<18} not without a Megatron that fits\n" in done.stdout


def test_the_exit_status_says_whether_a_check_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--without-training"]) == 0

    def failed(on_gpus: bool) -> str:
        raise trial.TrialError("drift by stage")

    monkeypatch.setattr(trial, "verified_training", failed)
    capsys.readouterr()
    assert doctor.main([]) == 1
    assert f"FAIL  {'training':<18} drift by stage\n" in capsys.readouterr().out


VERIFIED = trial.verified_training  # the fixture replaces it
LOSSES = [4.0 - step / 8 for step in range(trial.ITERATIONS)]


def events(losses: list[float], drift: tuple[int, ...]) -> list[dict[str, Any]]:
    stages = [{"max_drift": value} for value in drift]
    return [*({"event": "train", "loss": loss} for loss in losses), {"event": "drain", "stages": stages}]


@pytest.mark.parametrize(
    ("flush", "drained", "free", "drift", "reason"),
    [
        (LOSSES, LOSSES, LOSSES, (1, 0), None),
        (LOSSES, [*LOSSES[:-1], LOSSES[-1] + 2**-40], LOSSES, (1, 0), "are not 1F1B-flush's"),
        (LOSSES[:-1], LOSSES[:-1], LOSSES, (1, 0), "must be 8 numbers"),
        ([], [], [], (1, 0), "must be 8 numbers"),
        ([float("nan")] * 8, [float("nan")] * 8, LOSSES, (1, 0), "must be 8 numbers"),
        (LOSSES, LOSSES, [float("nan")] * 8, (1, 0), "PACI logged the losses"),
        (LOSSES, LOSSES, LOSSES, (2, 0), r"drift by stage of \[2, 0\] updates, where the plan has \[1, 0\]"),
        (LOSSES, LOSSES, LOSSES, (0, 0), r"drift by stage of \[0, 0\]"),
    ],
)
def test_a_training_with_another_result_fails(
    monkeypatch: pytest.MonkeyPatch,
    flush: list[float],
    drained: list[float],
    free: list[float],
    drift: tuple[int, ...],
    reason: str | None,
) -> None:
    def train(folder: Path, on_gpus: bool, schedule: str, *options: str) -> list[dict[str, Any]]:
        return events(flush if schedule == "1f1b" else drained if options else free, drift)

    monkeypatch.setattr(trial, "train", train)
    if reason is None:
        assert "8 losses bit for bit" in VERIFIED(False)
    else:
        with pytest.raises(trial.TrialError, match=reason):
            VERIFIED(False)


def test_a_training_that_ends_badly_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trial.sys, "executable", "/bin/ls")
    with pytest.raises(trial.TrialError, match=r"--pipeline-schedule 1f1b ended with status 2:\n.*ls"):
        trial.train(tmp_path, False, "1f1b")


def test_the_stand_ins_are_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.num_gpus() == 1
    monkeypatch.setattr(cpu, "is_active", lambda: True)
    assert machine.num_gpus() == 0
