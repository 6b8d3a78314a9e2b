"""The house rules that keep the parts apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import paci_megatron

PACKAGE = Path(paci_megatron.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The modules that ``path`` imports anywhere in it, by absolute name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return names


def uses(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imported(path))


def test_plan_imports_neither_torch_nor_megatron() -> None:
    for path in (PACKAGE / "plan").glob("*.py"):
        assert not uses(path, "torch") and not uses(path, "megatron"), path
    code = "import sys, paci_megatron.schedule; assert not {'torch', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_plugin_platform_and_evaluate_import_megatron_training() -> None:
    users = {path.relative_to(PACKAGE).parts[0] for path in MODULES if uses(path, "megatron.training")}
    assert users == {"plugin", "platform", "evaluate"}


def test_cuda_is_named_only_in_plugin_platform_and_the_device_helper() -> None:
    named = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if "torch.cuda" in ast.unparse(_without_docstrings(path))
        and path.relative_to(PACKAGE).parts[0] not in ("plugin", "platform", "evaluate")
    }
    assert named == {"runtime/device.py"}


def test_importing_the_package_changes_nothing() -> None:
    code = (
        "import torch, megatron.training.training as t; before = (t.train_step, torch.cuda.current_device)\n"
        "import paci_megatron; assert (t.train_step, torch.cuda.current_device) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_modules_and_functions_are_readable_in_one_sitting() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 70, f"{path}: {node.name}"


def _without_docstrings(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return tree
