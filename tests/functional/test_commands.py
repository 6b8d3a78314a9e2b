"""Whole commands as a user types them, through torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab.processes import CPU_ENVIRONMENT, ROOT
from tests.support.torchrun import MODEL, torchrun


def losses(output: str, name: str) -> list[str]:
    """The losses on Megatron's log lines, as printed."""
    return re.findall(rf" iteration .*\| {name}: (\S+) ", output)


def set_up(output: str) -> list[str]:
    """What the plugin prints before the first iteration; the list of all arguments is Megatron's.

    Each of our lines is one write, but may follow one of another process that has not ended yet.
    """
    before = re.split(r" \[.*iteration +1/", output, maxsplit=1)[0].splitlines()
    lines = [line for line in before if "paci" in line and not re.fullmatch(r" +\w+ \.+ .*", line)]
    return [re.sub(r"^.*?(?=paci-megatron: )", "", line) for line in lines]


_WARNING = r"(?:WARNING:|\[W\d|\w+\.py:\d+: \w*Warning:)"


def warnings(output: str) -> set[str]:
    """What PyTorch and Megatron warn of; that the rerun machine is in another mode is wanted.

    The processes write to one pipe, a line and its end apart, so a line may begin with another's, or end with one.
    """
    found: list[str] = re.findall(f"{_WARNING}(?:(?!{_WARNING}).)*", output)
    return {re.sub(r"RerunMode\.\w+", "", text).strip() for text in found}


def new_warnings(output: str, before: str) -> set[str]:
    """Those in ``output`` that are not in ``before``."""
    known = warnings(before)
    return {text for text in warnings(output) if not any(text.startswith(k) or k.startswith(text) for k in known)}


def test_a_warning_is_new_or_not_wherever_its_line_begins_and_ends() -> None:
    before = "WARNING:megatron:mode RerunMode.VALIDATE\n/a-b/x.py:3: UserWarning: no Apex\n  warnings.warn(\n"
    glued = "-----WARNING:megatron:mode RerunMode.DISABLED\n\n> done/a-b/x.py:3: UserWarning: no Apex----\n"
    assert len(warnings(before)) == 2
    assert not new_warnings(glued, before) and not new_warnings(before, glued)
    assert new_warnings(glued + "----WARNING: ours\n", before) == {"WARNING: ours"}
    assert new_warnings("x.py:4: FutureWarning: gone soon", before) == {"x.py:4: FutureWarning: gone soon"}


def test_any_script_runs_unmodified_under_the_module() -> None:
    script = [str(ROOT / "tests/functional/any_script.py"), *MODEL, "--train-iters", "30", "--greeting", "hello"]
    script += ["--pipeline-model-parallel-size", "2"]
    status, plain = torchrun("-m", "paci_megatron", *script)
    assert status == 0, plain[-3000:]
    without_effect = ("--log-energy", "--log-params-norm")
    status, paci = torchrun("-m", "paci_megatron", *script, "--pipeline-schedule", "paci", *without_effect)
    assert status == 0, paci[-3000:]
    assert "greeting: hello" in paci
    assert "schedule paci: 2 stages, 2 micro-batches per update, drift of at most 1 updates" in paci
    assert "paci-megatron: drained after iteration       30 | 30 updates | by stage: max drift 1 0" in paci
    before, after = losses(plain, "counting loss"), losses(paci, "counting loss")
    assert len(before) == len(after) == 30
    assert before[0] == after[0] and before[-1] != after[-1]
    assert float(after[-1]) < 0.8 * float(after[0]), "it learns"
    said = set_up(paci)
    assert all(line.startswith("paci-megatron: ") for line in said) and len(set(said)) == len(said) < 15, "\n".join(said)
    off = [line.split()[1] for line in said if " is off under paci: " in line]
    assert sorted(off) == ["--log-energy", "--log-params-norm", "--rerun-mode"], "a line each"
    topics = [line.split(": ")[1].split()[0] for line in said if line.split()[1] not in off]
    assert topics == ["no", "layers", "schedule", "memory", "clipping"], "\n".join(said)
    assert not new_warnings(paci, plain)
    assert len(set_up(plain)) == 2, "on a CPU, and with which layers"


def test_plain_modules_are_trained_without_megatrons_loop() -> None:
    status, output = torchrun("examples/plain_torch.py", processes=4)
    assert status == 0, output[-3000:]
    assert "stage 0: drift at most 2, on average 1.40 updates" in output
    assert "the weights of all 4 stages equal the replay in one process, bit for bit" in output


def test_a_stage_that_dies_ends_the_job_with_its_error(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(
        (ROOT / "tests/functional/any_script.py")
        .read_text()
        .replace(
            "    tokens = labels = positions = None\n",
            "    tokens = labels = positions = None\n"
            "    global calls\n"
            "    calls = globals().get('calls', 0) + 1\n"
            "    if parallel_state.is_pipeline_last_stage() and calls == 9:\n"
            "        raise ValueError('the ninth micro-batch is cursed')\n",
        )
    )
    status, output = torchrun(
        *("-m", "paci_megatron", str(script), *MODEL, "--train-iters", "1000", "--pipeline-model-parallel-size", "2"),
        *("--pipeline-schedule", "paci"),
    )
    assert status != 0
    assert "the ninth micro-batch is cursed" in output


def test_a_bad_command_line_gets_one_line_and_no_training() -> None:
    status, output = torchrun(
        *("pretrain_gpt_paci.py", *MODEL, "--train-iters", "4", "--mock-data", "--pipeline-model-parallel-size", "2"),
        *("--pipeline-schedule", "paci", "--use-torch-fsdp2"),
    )
    assert status != 0
    lines = [line for line in output.splitlines() if line.startswith("paci-megatron: error: ")]
    assert len(lines) == 1 and "--use-torch-fsdp2 does not work with --pipeline-schedule paci" in lines[0]
    assert "Traceback" not in output.split("torch/distributed/elastic")[0]
    assert not re.search(r" iteration +\d", output)


def test_megatrons_memory_estimate_is_of_one_stage_with_all_its_micro_batches() -> None:
    status, output = torchrun(
        *("pretrain_gpt_paci.py", *MODEL, "--global-batch-size", "2", "--mock-data", "--train-iters", "2"),
        *("--paci-emulate-stages", "2", "--use-distributed-optimizer", "--pipeline-schedule", "paci"),
        processes=1,
    )
    assert status == 0, output[-3000:]
    assert "Number of in-flight microbatches: 2" in output, "N, with one micro-batch in an update; a flush has 1"


def test_usage_of_the_module() -> None:
    def module(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paci_megatron", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert module("--help").returncode == 0 and module("--help").stdout.startswith("usage: torchrun")
    nothing = module()
    assert nothing.returncode == 2 and nothing.stderr.startswith("usage: ")
    missing = module("no/such/script.py")
    assert missing.returncode == 2 and "no/such/script.py: no such file" in missing.stderr


def _blocks(page: str, heading: str) -> list[str]:
    """The commands of ``page`` from ``heading`` on."""
    return (ROOT / page).read_text(encoding="utf-8").partition(heading)[2].split("```\n")[1::2]


def _shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """``script`` in ``folder``, where this checkout is installed."""
    programs = folder / "bin"
    programs.mkdir()
    code = "import sys; from paci_megatron.cli.main import main; sys.exit(main())"
    for name, command in (("paci-megatron", f"-c '{code}'"), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **CPU_ENVIRONMENT, **path}
    # A file: `pkill -f` would find the shell by what it is told.
    (folder / "commands.sh").write_text(script)
    return subprocess.run(["bash", "-e", "commands.sh"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_readmes_commands_for_ones_own_data(tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    done = _shell(tmp_path, _blocks("README.md", "### Your own data, end to end")[0])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("token perplexity") == 2
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 1e5 and (tmp_path / "runs/mine/loss.png").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_guides_kill_and_resume(tmp_path: Path) -> None:
    start, kill, resume, *_ = _blocks("docs/user-guide.md", "To see it, in two shells")
    waits = "for i in $(seq 600); do grep -q ' iteration *7[0-9]/' log && break; sleep 0.1; done"
    # A folder of its own in place of runs/: `pkill -f` must find this run and no other.
    script = f"({start}) > log 2>&1 & {waits}\n{kill}wait || true\n{start.rpartition('train killed')[0]}{resume}"
    done = _shell(tmp_path, script.replace("runs/", f"{tmp_path}/runs/"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "at iteration 50" in done.stdout
    killed, whole = [re.findall(rf'{name}.jsonl:"prefix".*"loss": (\S+),', done.stdout) for name in ("killed", "whole")]
    assert killed == whole and len(whole) >= 1
