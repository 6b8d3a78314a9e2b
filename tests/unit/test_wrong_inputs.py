"""A hundred wrong inputs, through every door: one clear line, a status that is not 0, nothing left behind, no traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import paci_megatron.cli.main as cli
from lab.processes import ROOT
from tests.support import interpreter, wrong_inputs
from tests.support.wrong_inputs import COMMANDS, EARLY, LATE


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are not what a command takes them for."""
    folder = tmp_path_factory.mktemp("inputs")
    wrong_inputs.prepare(folder)
    return folder


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


def is_refusal(status: object, printed: str, words: str) -> bool:
    """Whether it is one line that says so, or one for each of several reasons."""
    first, *others = printed.strip().split("\n")
    is_clear = "error: " in first and len(first) < 500 and words in printed and "Traceback" not in printed
    return status not in (0, None) and is_clear and (not others or "reasons:" in first)


def require_refusals(cases: list[tuple[str, str]], answers: list[list[Any]]) -> None:
    wrong = [
        f"{command.removeprefix(wrong_inputs.MODEL)}\n  wanted: {words}\n  {status}: {printed[-400:]}"
        for (command, words), (status, printed) in zip(cases, answers, strict=True)
        if not is_refusal(status, printed, words)
    ]
    if wrong:
        pytest.fail("\n".join(wrong))


# Runs in a process of its own: {name: [status, what it printed]} of every command line, through both doors of training.
_TRAINING = """
import contextlib, io, json, sys
sys.argv = ["x"]
import pretrain_gpt_paci, paci_megatron.__main__ as door
from pathlib import Path
commands, late, script = json.loads(Path({table!r}).read_text())
answers = []
def ask(call, *arguments):
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = call(*arguments)
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        status = "raised " + repr(error)
    # Megatron prints and warns; what ends the command is the last, and the only one of its kind.
    before, found, last = errors.getvalue().rpartition("paci-megatron: error: ")
    answers.append([status, found + last if "error: " not in before else errors.getvalue()])
def training(words):
    sys.argv = ["pretrain_gpt_paci.py", *words]
    pretrain_gpt_paci.main()
for words in commands:
    ask(training, words)
    ask(door.main, [script, *words])
answers.append([sorted({{"torch", "megatron"}} & set(sys.modules)), ""])
if late:
    import megatron.training
    def pretrain(*_, **__):
        raise AssertionError("accepted")
    megatron.training.pretrain = pretrain
for words in late:
    ask(training, words)
Path({output!r}).write_text(json.dumps(answers))
"""


def test_what_the_words_alone_tell_is_refused_before_torch_is_imported(at: Path, tmp_path: Path) -> None:
    empty, table, output = tmp_path / "empty", tmp_path / "table", tmp_path / "output"
    empty.mkdir()
    before = files(at)
    commands = [text.format(at=at, empty=empty).split() for text, _ in EARLY]
    table.write_text(json.dumps([commands, [], str(ROOT / "tests/functional/any_script.py")]))
    code = _TRAINING.format(table=str(table), output=str(output))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *answers, (imported, _) = json.loads(output.read_text())
    asked = [case for case in EARLY for _ in range(2)]
    require_refusals(asked, answers)
    assert imported == []
    assert not files(empty) and files(at) == before


def test_what_megatron_and_the_data_tell_is_refused_in_one_line(at: Path, tmp_path: Path) -> None:
    empty, table, output = tmp_path / "empty", tmp_path / "table", tmp_path / "output"
    empty.mkdir()
    before = files(at)
    commands = [text.format(at=at, empty=empty).split() for text, _ in LATE]
    table.write_text(json.dumps([[], commands, ""]))
    interpreter.run(_TRAINING.format(table=str(table), output=str(output)))
    _, *answers = json.loads(output.read_text())
    require_refusals(LATE, answers)
    assert not files(empty) and files(at) == before


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[command[:60] for command, _ in COMMANDS])
def test_each_command_refuses_in_one_line(
    at: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    before, begin_s = files(at), time.monotonic()
    try:
        status: object = cli.main(command.format(at=at, empty=tmp_path).split())
    except SystemExit as end:
        status = end.code
    output = capfd.readouterr()
    assert is_refusal(status, output.err + output.out, words), output.err + output.out
    assert not files(tmp_path) and files(at) == before
    assert time.monotonic() - begin_s < 30


def test_the_counts_in_the_results_are_these() -> None:
    inputs = len(EARLY) + len(LATE) + len(COMMANDS)
    parts = rf"\({len(EARLY)} on the command line.*; {len(LATE)} that Megatron.*; {len(COMMANDS)} to the commands\)"
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert re.search(rf"tries {inputs} inputs in {inputs + len(EARLY)} attempts {parts}", text, re.DOTALL)
