"""Every command in README.md and docs/ is run by a test, here or in the one named, or says that it needs GPUs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.benchmark import main as benchmark
from lab.processes import ROOT
from lab.study import main as study
from paci_megatron.cli import main as cli
from paci_megatron.plugin.check import check_without_megatron
from tests.support import report_runs as made

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
PROGRAMS = {"make", "paci-megatron", "python", "torchrun", "pip", "pkill", "grep", "git"}
# How the blocks begin that are no commands.
SHOWN = ("paci-megatron: ", "ok: ", "pretrain_gpt_paci.py      Megatron's", "stage  forward (ms)")

# Blocks that a test runs as a whole, by their first line.
SCRIPTS = {
    "pip install 'paci_megatron-0.1.0-py3-none-any.whl[plot]'": (
        "tests/unit/test_packaging.py::test_wheel_installs_into_an_empty_environment"
    ),
    "TEXT='docs/*.md'": "tests/functional/test_commands.py::test_the_readmes_commands_for_ones_own_data",
    "train() {": "tests/functional/test_commands.py::test_the_guides_kill_and_resume",
    "pkill -KILL -f runs/killed": "tests/functional/test_commands.py::test_the_guides_kill_and_resume",
    "train killed": "tests/functional/test_commands.py::test_the_guides_kill_and_resume",
}
# Commands that are run with other files or in small, by how they begin.
ELSEWHERE = {
    "make demo": "tests/unit/test_demo.py::test_whole_demo_with_few_iterations",
    "make test": ".ci/run::make",
    "make docs": "tests/unit/test_docs.py::site",
    "pip install": "tests/unit/test_packaging.py::test_every_extra_that_a_message_names_exists",
    "torchrun --nproc-per-node 4 examples/plain_torch.py": (
        "tests/functional/test_commands.py::test_plain_modules_are_trained_without_megatrons_loop"
    ),
    "tools/gpu_check.py": "tests/unit/test_gpu_check.py::test_all_checks_in_small_on_a_cpu",
    "tools/plan_schedule.py --study": "tests/unit/test_plan_schedule.py::test_study_prints_a_row_a_setting",
    "paci-megatron doctor": (
        "tests/functional/test_doctor.py::test_this_machine_trains_as_it_must_and_nothing_is_left_behind"
    ),
    "tools/benchmark_nodes.py": (
        "tests/functional/test_nodes.py::test_auto_measures_the_delay_between_two_nodes_and_hides_it"
    ),
    "paci-megatron check": "tests/functional/test_check.py::test_each_command_has_its_answer",
    "tools/evaluate_perplexity.py --load runs/gpt --input data": (
        "tests/multiproc/test_evaluation.py::test_command_writes_the_figures_and_prints_a_table"
    ),
    "tools/evaluate_perplexity.py --load runs/gpt --input wiki": (
        "tests/multiproc/test_evaluation.py::test_stride_one_is_token_by_token"
    ),
    "torchrun --nproc-per-node 4 tools/evaluate_perplexity.py": (
        "tests/multiproc/test_evaluation.py::test_last_words_are_a_hand_loop"
    ),
    "tools/plan_schedule.py --trace runs/trace --balance": "tests/unit/test_trace.py::test_balance_from_a_trace",
}
# What is run here, as it stands or as a dry run: how it begins, and what runs the words behind.
HERE: dict[str, Callable[[list[str]], int]] = {
    "tools/plan_schedule.py": lambda words: cli.run("plan", words),
    "tools/plot_curves.py": lambda words: cli.run("plot", words),
    "tools/run_report.py": lambda words: cli.run("report", words),
    "tools/benchmark_throughput.py": lambda words: benchmark.main([*words, "--dry-run"]),
    "tools/reproduce_paper.py": lambda words: study.main([*words, "--dry-run"]),
}


def blocks(page: str) -> list[list[str]]:
    """The fenced blocks of ``page``, line by line; a command over several lines is one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block.replace("\\\n", " ").splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)]


def program(line: str) -> str:
    words = line.split()
    return "tools" if words and words[0].startswith("tools/") else words[0] if words else ""


def is_form(command: str) -> bool:
    """Whether something is left out, for the reader's own words."""
    return " ..." in command or "<" in command


def all_commands() -> list[tuple[str, str]]:
    """Page and command, in a block or in the text, without its comment and "python", with one space between words."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            if block[0].startswith(SHOWN) or block[0].split("    #")[0] in SCRIPTS:
                continue
            for line in filter(None, block):
                assert program(line) in {*PROGRAMS, "tools"}, f"{page}: {line}: is it a command? See PROGRAMS and SHOWN"
                if "GPU" not in line.partition(" # ")[2]:
                    found.append((page, line.split(" # ")[0]))
        text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        found += [(page, line) for line in re.findall(r"`((?:make|pip|python|torchrun|tools/[^\s`]+) [^`]+)`", text)]
    return [(page, " ".join(line.split()).removeprefix("python ")) for page, line in found]


COMMANDS = all_commands()
FORMS = [command for _, command in COMMANDS if is_form(command) and "torchrun" in command]
RUN = [
    pytest.param(command, marks=[pytest.mark.slow] if "--jitter" in command else [])  # seconds, of many simulations
    for _, command in COMMANDS
    if command not in FORMS and command.startswith(tuple(HERE)) and not command.startswith(tuple(ELSEWHERE))
]


def test_every_command_has_a_test() -> None:
    homeless = [
        f"{page}: {command}"
        for page, command in COMMANDS
        if command not in FORMS and not command.startswith((*HERE, *ELSEWHERE))
    ]
    assert not homeless, "name their tests in ELSEWHERE:\n" + "\n".join(homeless)


@pytest.mark.parametrize("home", sorted({*SCRIPTS.values(), *ELSEWHERE.values()}))
def test_the_tests_exist(home: str) -> None:
    file, _, name = home.partition("::")
    assert re.search(rf"^def {name}\(|^ +{name} ", (ROOT / file).read_text(encoding="utf-8"), re.M)


def test_every_name_is_of_a_command_that_stands_there() -> None:
    texts = [command for _, command in COMMANDS]
    first = [block[0].split("    #")[0] for page in PAGES for block in blocks(page)]
    assert not [name for name in (*HERE, *ELSEWHERE) if not any(text.startswith(name) for text in texts)]
    assert not [name for name in SCRIPTS if name not in first]


@pytest.mark.parametrize("command", FORMS)
def test_no_form_has_an_option_that_is_refused(command: str) -> None:
    words = re.sub(r"<[^>]+>|\.\.\.", " ", command).split()
    stages = (
        []
        if any(word.endswith(("-parallel-size", "-stages")) for word in words)
        else ["--pipeline-model-parallel-size", "8"]
    )
    check_without_megatron([*words, *stages])


@pytest.mark.parametrize("command", RUN)
def test_it_runs_as_it_stands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made.write_runs(tmp_path / "runs/demo")
    for name in ("runs/a.jsonl", "runs/b.jsonl", "RUN.jsonl"):
        made.write_events(tmp_path / name, made.training("paci"))
    made.write_trace(tmp_path / "runs/trace", "paci", updates=104)
    for folder in ("docs/images", "data"):
        (tmp_path / folder).mkdir(parents=True)
    begin = next(name for name in HERE if command.startswith(name))
    assert HERE[begin](shlex.split(command.removeprefix(begin))) == 0


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_in_the_text_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    known = {name for commands in cli.COMMANDS.values() for name in commands}
    named = set(re.findall(r"`paci-megatron ([a-z]+)", text))
    assert named <= known
    assert not [name for name in re.findall(r"\btools/\w+\.(?:py|sh)\b", text) if not (ROOT / name).is_file()]
