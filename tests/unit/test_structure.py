"""The walls between the rooms (docs/design.md), by what the modules import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import paci_megatron

PACKAGE = Path(paci_megatron.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What the modules of each room may import of the package. The modules beside the rooms are named as they are.
MAY_IMPORT: dict[str, set[str]] = {
    "schedule": set(),
    "simulate": {"schedule", "usage"},
    "runtime": {"schedule"},
    "telemetry": {"schedule", "simulate", "runtime", "usage"},
    "data": set(),
    "platform": {"config", "runtime"},
    "plugin": {"arguments", "config", "flags", "data", "platform", "runtime", "schedule", "simulate", "telemetry"},
    "evaluate": {"config", "data", "platform", "plugin"},
    "cli": {
        "",
        "arguments",
        "config",
        "data",
        "evaluate",
        "platform",
        "plugin",
        "schedule",
        "simulate",
        "telemetry",
        "usage",
    },
    "arguments": {"config"},
    "flags": {"config", "simulate"},
    "config": {"schedule", "telemetry", "usage"},
    "usage": set(),
    "__main__": {"", "plugin"},
    "": {"config", "plugin"},
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def _nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes_at_run_time(node)


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules that ``path`` imports anywhere in it, by absolute name."""
    names: set[str] = set()
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in _nodes_at_run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            parts = {f"{module}.{alias.name}" for alias in node.names}
            names.update((parts & NAMES) or {module})
    return frozenset(names)


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_what_its_walls_let_through(path: Path) -> None:
    here = room(name_of(path))
    used = {room(name) for name in imported(path) & NAMES} - {here}
    assert used <= MAY_IMPORT[here], f"{path}: {used - MAY_IMPORT[here]}"


def test_no_import_goes_round_in_a_circle() -> None:
    def order(graph: dict[str, set[str]]) -> None:
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"imports in a circle: {error.args[1]}")

    order({name_of(path): set(imported(path) & NAMES) - {name_of(path)} for path in MODULES})
    order({name: rooms for name, rooms in MAY_IMPORT.items()})


def test_schedule_and_simulate_import_neither_torch_nor_megatron() -> None:
    for path in (*(PACKAGE / "schedule").glob("*.py"), *(PACKAGE / "simulate").glob("*.py")):
        assert not uses(path, "torch") and not uses(path, "megatron"), path
    code = (
        "import sys, paci_megatron.schedule.plan, paci_megatron.simulate.advice; "
        "assert not {'torch', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_runtime_trains_modules_without_megatron() -> None:
    """All that examples/plain_torch.py needs; what is Megatron's comes in through the executor's protocols."""
    code = (
        "import sys, paci_megatron.runtime.executor, paci_megatron.runtime.groups, paci_megatron.runtime.emulate; "
        "assert 'megatron' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_plugin_platform_and_evaluate_know_megatrons_training_loop() -> None:
    users = {room(name_of(path)) for path in MODULES if uses(path, "megatron.training")}
    assert users <= {"plugin", "platform", "evaluate"} and "plugin" in users


def test_cuda_is_named_only_there_and_in_the_device_helper() -> None:
    named = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if "torch.cuda" in ast.unparse(_without_docstrings(path))
        and room(name_of(path)) not in ("plugin", "platform", "evaluate", "cli")
    }
    assert named == {"runtime/device.py"}


def test_the_product_knows_nothing_of_the_laboratory() -> None:
    for path in (*MODULES, ROOT / "pretrain_gpt_paci.py"):
        assert not uses(path, "lab") and not uses(path, "tools") and not uses(path, "tests"), path
    assert any(uses(path, "paci_megatron") for path in (ROOT / "lab").rglob("*.py"))


def test_importing_the_package_changes_nothing() -> None:
    code = (
        "import torch, megatron.training.training as t; before = (t.train_step, torch.cuda.current_device)\n"
        "import paci_megatron; assert (t.train_step, torch.cuda.current_device) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_modules_and_functions_are_readable_in_one_sitting() -> None:
    for path in (*MODULES, *(ROOT / "lab").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"


def test_one_global_holds_the_run_and_everything_else_is_in_it() -> None:
    holders = {
        f"{name_of(path)}: {name}"
        for path in (PACKAGE / "plugin").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Global)
        for name in node.names
    }
    assert holders == {"paci_megatron.plugin.run: _current"}


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return tree
