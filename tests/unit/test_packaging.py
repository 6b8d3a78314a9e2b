"""The wheel holds the package and nothing else; tools/make_venv.sh finds an interpreter that really works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import paci_megatron

ROOT = Path(__file__).resolve().parents[2]
MAKE_VENV = ROOT / "tools" / "make_venv.sh"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: setuptools leaves a build/ folder where it works."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "pretrain_gpt_paci.py"):
        shutil.copy(ROOT / name, source)
    # tools and tests are copied so that the wheel could take them in by mistake.
    for name in ("paci_megatron", "tools", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    result = subprocess.run([*command, "-w", output, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = output.glob("*.whl")
    return path


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "paci_megatron").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == {*package, "pretrain_gpt_paci.py"}


def test_wheel_metadata(wheel: Path) -> None:
    metadata = read_metadata(wheel)
    assert metadata["Name"] == "paci-megatron"
    assert metadata["Version"] == paci_megatron.__version__
    assert metadata["Requires-Python"] == ">=3.12"
    requirements = metadata.get_all("Requires-Dist", [])
    assert any(line.startswith("megatron-core") for line in requirements)
    # On the index this name belongs to another project.
    assert not any(line.lower().startswith(("apex", "nvidia-apex")) for line in requirements)


def test_constraints_pin_every_requirement(wheel: Path) -> None:
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    for line in read_metadata(wheel).get_all("Requires-Dist", []):
        requirement, _, marker = line.partition(";")
        if "gpu" not in marker and "tensorboard" not in marker:
            name = re.split("[^A-Za-z0-9_.-]", requirement)[0]
            assert name.lower() in pinned


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments: str | Path) -> str:
        result = subprocess.run([python, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    assert "usage" in run("-m", "paci_megatron", "--help").lower()
    for module in ("paci_megatron", "pretrain_gpt_paci"):
        location = run("-c", f"import {module}; print({module}.__file__)").splitlines()[-1]
        assert Path(location).is_relative_to(tmp_path / "venv")


def make_program(directory: Path, name: str, script: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def choose_python(home: Path, path: list[Path], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs make_venv.sh --print where only `path` and `home` can hold a Python."""
    environment = {"HOME": str(home), "PATH": os.pathsep.join(map(str, path)), **variables}
    command = ["/bin/sh", str(MAKE_VENV), "--print"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# What a working interpreter answers: the program itself, not the environment the tests run in.
THIS_PYTHON = getattr(sys, "_base_executable", sys.executable)
RUN_THIS_PYTHON = f'exec "{sys.executable}" "$@"'


def test_no_usable_python_names_what_was_tried(tmp_path: Path) -> None:
    broken = make_program(tmp_path / "bin", "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")
    old = make_program(tmp_path / "bin", "python3", f'exec "{sys.executable}" -c "raise SystemExit(\'is Python 3.9\')"')
    result = choose_python(tmp_path, [tmp_path / "bin"])
    assert result.returncode == 1
    assert result.stdout == ""
    for text in (
        f"{broken}: pyenv: python3.12: command not found",
        "python3.13: not on PATH",
        f"{old}: is Python 3.9",
        f"pyenv: no Python of these versions in {tmp_path}/.pyenv/versions",
        "uv: not on PATH",
        "apt install python3.12",
        "make PYTHON=",
    ):
        assert text in result.stderr


def test_a_silent_failure_is_reported_with_its_status(tmp_path: Path) -> None:
    silent = make_program(tmp_path / "bin", "python3.12", "exit 1")
    assert f"{silent}: exits with status 1" in choose_python(tmp_path, [tmp_path / "bin"]).stderr


def test_unusable_versions_are_refused_by_the_probe(tmp_path: Path) -> None:
    """The real probe against a Python that says it is 3.11, and against one without ensurepip."""
    startup = tmp_path / "startup"
    startup.mkdir()
    (startup / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ['PRETEND'] == 'old': sys.version_info = (3, 11, 0)\n"
        "if os.environ['PRETEND'] == 'no ensurepip': sys.modules['ensurepip'] = None\n"
    )
    make_program(tmp_path / "bin", "python3.12", RUN_THIS_PYTHON)
    for pretence, reason in (("old", "is Python 3.11"), ("no ensurepip", "cannot create environments")):
        result = choose_python(tmp_path, [tmp_path / "bin"], PYTHONPATH=str(startup), PRETEND=pretence)
        assert result.returncode == 1
        assert reason in result.stderr


@pytest.mark.parametrize("where", ["path", "pyenv", "uv"])
def test_a_broken_launcher_is_skipped(tmp_path: Path, where: str) -> None:
    shims = tmp_path / "shims"
    make_program(shims, "python3.12", "exit 127")
    if where == "path":
        # A second python3.12, behind the one that does not work.
        make_program(tmp_path / "bin", "python3.12", RUN_THIS_PYTHON)
    elif where == "pyenv":
        make_program(tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin", "python", RUN_THIS_PYTHON)
    else:
        python = make_program(tmp_path / "uv-data", "python3.12", RUN_THIS_PYTHON)
        make_program(tmp_path / "bin", "uv", f'[ "$1 $2" = "python find" ] && echo "{python}"')
    result = choose_python(tmp_path, [shims, tmp_path / "bin"])
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{THIS_PYTHON}\n"


def test_python_variable_overrides_the_search(tmp_path: Path) -> None:
    make_program(tmp_path / "bin", "python3.12", "exit 1")
    result = choose_python(tmp_path, [tmp_path / "bin"], PYTHON=sys.executable)
    assert result.stdout == f"{THIS_PYTHON}\n"
    # What was named is used or refused; nothing else is tried instead.
    result = choose_python(tmp_path, [tmp_path / "bin"], PYTHON="/nowhere/python3.12")
    assert result.returncode == 1
    assert "/nowhere/python3.12: " in result.stderr
    assert "pyenv: " not in result.stderr
