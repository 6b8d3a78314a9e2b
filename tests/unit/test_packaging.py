"""The wheel holds the package and nothing else; tools/make_venv.sh finds an interpreter that really works."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import paci_megatron
from paci_megatron.cli import main as cli
from tests.support.torchrun import MODEL

ROOT = Path(__file__).resolve().parents[2]
MAKE_VENV = ROOT / "tools" / "make_venv.sh"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: setuptools leaves a build/ folder where it works."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "docs/package-page.md", "pretrain_gpt_paci.py"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # lab, tools and tests are copied so that the wheel could take them in by mistake.
    for name in ("paci_megatron", "lab", "tools", "tests"):
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
    # A relative link leads nowhere from a package's page.
    links = re.findall(r"\]\(([^)]*)\)", str(metadata.get_payload()))
    assert links and all(link.startswith("https://") for link in links), links
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
        name = re.split("[^A-Za-z0-9_.-]", requirement)[0]
        if "gpu" not in marker and name != "paci-megatron":
            assert name.lower() in pinned


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel installed in it, which sees what else is installed here but nothing of the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--no-index", str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    libraries = [Path(entry) for entry in (sysconfig.get_path("purelib"), *sys.path) if entry.endswith("site-packages")]
    # Linked one by one: an editable installation of this project must not come along.
    for library in libraries:
        for entry in library.iterdir() if library.is_dir() else ():
            if entry.suffix != ".pth" and not entry.name.lower().startswith(("paci", "__editable__")):
                with contextlib.suppress(FileExistsError):
                    (site / entry.name).symlink_to(entry)
    return environment


def run_elsewhere(environment: Path, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What that environment's ``program`` answers to ``arguments`` in ``folder``."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [str(environment / "bin" / program), *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


# What each command does for someone who has only the wheel: arguments, exit status, and a part of what it answers.
ANSWERS = {
    "doctor": ("--without-training", 0, "PASS  Megatron"),
    "check": ("python train.py", 2, "not a torchrun command"),
    "preprocess": ("--input none.txt --output-prefix x --train-tokenizer --vocab-size 300", 2, "none.txt: no such file"),
    "evaluate": ("--input x --load no/folder", 2, "--load no/folder: no such folder"),
    "plot": ("none.jsonl --output x.png", 2, "none.jsonl: no such file or folder"),
    "report": ("none.jsonl --output x.html", 2, "none.jsonl: no such file or folder"),
    "plan": ("--num-stages 2 --microbatches-per-update 2 --stage-ms 1:2", 0, "2 stages, 2 micro-batches per update"),
}
COMMANDS = [name for commands in cli.COMMANDS.values() for name in commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_from_the_wheel(installed: Path, tmp_path: Path, command: str) -> None:
    arguments, status, answer = ANSWERS[command]
    done = run_elsewhere(installed, tmp_path, "paci-megatron", command, *shlex.split(arguments))
    assert done.returncode == status and answer in done.stdout + done.stderr, done.stdout + done.stderr
    asked = run_elsewhere(installed, tmp_path, "paci-megatron", command, "--help")
    assert asked.returncode == 0 and f"paci-megatron {command}" in asked.stdout
    assert ".py" not in asked.stdout, "names a script, which the wheel does not have"


def test_the_wheels_modules_are_the_installed_ones(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.util import find_spec\n"
        "for name in ('paci_megatron', 'pretrain_gpt_paci', 'lab'): print(getattr(find_spec(name), 'origin', None))"
    )
    package, entry, lab = run_elsewhere(installed, tmp_path, "python", "-c", code).stdout.split()
    assert Path(package).is_relative_to(installed) and Path(entry).is_relative_to(installed)
    assert lab == "None"


def test_every_module_of_the_cli_is_a_command() -> None:
    files = {path.stem for path in (ROOT / "paci_megatron" / "cli").glob("*.py")} - {"__init__", "main", "parser"}
    assert files == {command.module for commands in cli.COMMANDS.values() for command in commands.values()}


def test_the_commands_help_imports_nothing_slow() -> None:
    code = (
        "import sys; from paci_megatron.cli.main import main; assert main(['--help']) == main(['--version']) == 0; "
        "import paci_megatron.cli.plan, paci_megatron.cli.report; "
        "assert not {'torch', 'megatron', 'numpy', 'matplotlib', 'plotly'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"paci-megatron {paci_megatron.__version__}\n")
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_what_an_extra_installs_is_named_when_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails as if it were not installed
    drawn = ["plan", *shlex.split(ANSWERS["plan"][0]), "--timeline", str(tmp_path / "plan.png")]
    assert cli.main(drawn) == 2
    message = "paci-megatron plan: error: matplotlib is not installed: pip install 'paci-megatron[plot]'\n"
    assert capsys.readouterr().err == message
    assert cli.main(["draw"]) == 2 and "draw: no such command; choose from" in capsys.readouterr().err


def test_every_extra_that_a_message_names_exists(wheel: Path) -> None:
    extras = read_metadata(wheel).get_all("Provides-Extra", [])
    assert {"data", "eval", "gpu", "plot", "tensorboard", *cli.EXTRAS.values()} <= set(extras)


def check_first_hour(environment: Path, folder: Path) -> None:
    """A script that knows nothing of the plugin, from the empty environment to the report of both schedules."""
    script = str(shutil.copy(ROOT / "tests/functional/any_script.py", folder))
    train = ["--nproc-per-node", "2", "-m", "paci_megatron", script, *MODEL, "--train-iters", "20"]
    train += ["--pipeline-model-parallel-size", "2"]
    commands: list[list[str]] = [
        ["paci-megatron", "doctor"],
        ["paci-megatron", "check", "--", "torchrun", *train, "--pipeline-schedule", "paci"],
        *(
            [
                "torchrun",
                "--standalone",
                *train,
                "--pipeline-schedule",
                schedule,
                "--paci-metrics-file",
                f"runs/{schedule}.jsonl",
            ]
            for schedule in ("1f1b", "paci")
        ),
        ["paci-megatron", "report", "runs", "--output", "report.html"],
    ]
    for program, *arguments in commands:
        done = run_elsewhere(environment, folder, program, *arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "tokens/s" in page and "runs/paci.jsonl" in page


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    install = ["python", "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), f"{wheel}[plot]"]
    done = run_elsewhere(environment, tmp_path, *install)
    assert done.returncode == 0, done.stdout + done.stderr
    check_first_hour(environment, tmp_path)
    for command in COMMANDS:
        arguments, status, answer = ANSWERS[command]
        done = run_elsewhere(environment, tmp_path, "paci-megatron", command, *shlex.split(arguments))
        assert done.returncode == status and answer in done.stdout + done.stderr, done.stdout + done.stderr
    assert "usage" in run_elsewhere(environment, tmp_path, "python", "-m", "paci_megatron", "--help").stdout


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


def test_the_version_stands_in_the_changelog_and_the_citation() -> None:
    version = re.escape(paci_megatron.__version__)
    assert re.search(f"^## {version}( |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.search(f"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
