"""What is refused before Megatron is imported: its copy of Megatron's options is true, and it refuses nothing that works."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lab.processes import ROOT
from paci_megatron.arguments import add_paci_arguments
from paci_megatron.config import ConfigError
from paci_megatron.plugin import early
from paci_megatron.plugin.early import MEGATRON_NUMBERS, check_early, check_numbers, flag_of, without_effect
from tests.support.wrong_inputs import MODEL, PACI


def test_megatron_has_each_option_with_that_type_and_default(megatron_defaults: Any) -> None:
    parsed = early._parse([])
    for name, (kind, can_work, _) in MEGATRON_NUMBERS.items():
        assert flag_of(name) in megatron_defaults.flags
        default = getattr(megatron_defaults.values, name)
        assert default is None or (isinstance(default, kind) and can_work(default)), name
    for name in early._TEXTS:
        assert flag_of(name) in megatron_defaults.flags
    for name, default in early._DEFAULTS.items():
        assert getattr(megatron_defaults.values, name) == default == getattr(parsed, name)
    check_numbers(megatron_defaults.values)


@pytest.mark.parametrize("more", ["", "--paci-extra-in-flight 6", "--lr=1e-3 --seq-length=8", "--paci-start-iteration 3"])
def test_what_can_work_is_accepted(tmp_path: Path, more: str) -> None:
    check_early([*PACI.split(), "--save", str(tmp_path / "new"), *more.split()], 1)
    check_early(
        f"srun -N 2 torchrun --nproc-per-node 2 x.py {MODEL} --script-option 3 {more.partition('--paci')[0]}".split(), None
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("elsewhere", ["--yaml-cfg x.yaml", "--use-checkpoint-args", "--help"])
def test_where_the_words_do_not_say_all_nothing_is_said(elsewhere: str) -> None:
    check_early(f"{PACI} --lr nan {elsewhere}".split(), 1)
    with pytest.raises(ConfigError):
        check_early(f"{PACI} --lr nan".split(), 1)


def test_options_that_do_nothing_without_the_schedule_are_named_in_one_line() -> None:
    def lines(text: str) -> list[str]:
        return without_effect(add_paci_arguments(argparse.ArgumentParser()).parse_args(text.split()))

    assert lines("--paci-metrics-file x") == lines("--pipeline-schedule paci --paci-fallback 3") == []
    (line,) = lines("--paci-clip-mode stage --paci-fallback 3 --paci-strict")
    assert line.endswith("without effect here: --paci-clip-mode, --paci-fallback, --paci-strict")


def test_no_help_imports_torch_or_megatron() -> None:
    code = """
import contextlib, io, sys
from paci_megatron.cli.main import COMMANDS, main
for name in [name for commands in COMMANDS.values() for name in commands]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as text:
        main([name, "--help"])
    assert text.getvalue().startswith(f"usage: paci-megatron {name}"), name
main(["--help"]), main(["--version"])
print(sorted({"torch", "megatron"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done
