"""The scripts that reproduce the paper (examples/gpt), without the GPUs: what they would run, and what they refuse."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.study.arms import SETS
from lab.study.commands import placeholder_data, training_command
from paci_megatron.schedule.schedules import max_drift, speedup_limit
from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.paper_scripts import EXAMPLES, PACI, PREPARE, ROOT, SLURM, TRAIN, Arm, bash, printed, value

NUM_STAGES = 8
PAPER_TOKENS = 49.8e9


ARMS = [Arm(*chosen) for chosen in itertools.product(("1f1b", "paci"), (128, 256), (4, 8, 16, 32))]


def check(*commands: list[str]) -> tuple[int, list[str]]:
    """Exit status and verdicts of tools/check_training_command.py, in one process for all."""
    text = "".join(f"{shlex.join(command)}\n" for command in commands)
    tool = [sys.executable, str(ROOT / "tools/check_training_command.py")]
    done = subprocess.run(tool, input=text, capture_output=True, text=True, timeout=200)
    verdicts = [line for line in done.stdout.splitlines() if line.startswith(("ok: ", "error: "))]
    assert len(verdicts) == len(commands), done.stdout + done.stderr
    return done.returncode, verdicts


FLUSH = PACI._replace(schedule="1f1b")
TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}

# By what is said to them.
OTHER_COMMANDS: dict[str, Callable[[], list[str]]] = {
    r"error: unrecognized arguments: --no-such-flag 3": lambda: printed(PACI, EXTRA_FLAGS="--no-such-flag 3"),
    r"error: argument --lr: invalid float value: 'fast'": lambda: printed(PACI, EXTRA_FLAGS="--lr fast"),
    r"error: --use-megatron-fsdp does not work with .* paci: .*Remove": lambda: printed(PACI, "--use-megatron-fsdp"),
    r"error: refused by Megatron: The length of pipeline_model_parallel_layout must be": lambda: printed(
        PACI, LAYOUT="Et*24|L"
    ),
    r"error: .*leaves stage 6 empty.*Give it a layer": lambda: printed(PACI, LAYOUT="Et*4|t*4|t*4|t*4|t*4|t*3||tL"),
    r"error: refused by Megatron: global batch size \(128\) is not divisible by micro batch size": lambda: printed(
        FLUSH, EXTRA_FLAGS="--micro-batch-size 24 --eval-micro-batch-size 16"
    ),
    r"error: refused by Megatron: assert args.save_retain_interval % args.save_interval == 0": lambda: printed(
        FLUSH, EXTRA_FLAGS="--save-retain-interval 3000"
    ),
    r"error: python train.py .*not a torchrun command": lambda: ["python", "train.py"],
    r"ok: schedule paci, 8 stages, 8 micro-batches of 16": lambda: printed(
        PACI, "--log-interval", "50", LAYOUT="even", EXTRA_FLAGS=" --recompute-granularity\n selective "
    ),
    r"ok: schedule paci, 8 stages .*, 2 pipelines, 8 micro-batches of 8 sequences": lambda: printed(PACI, **TWO_NODES),
}


@pytest.fixture(scope="module")
def commands() -> dict[Arm, list[str]]:
    """Every arm's command, all with one output folder."""
    return {arm: printed(arm, OUTPUT="/data/run") for arm in ARMS}


@pytest.fixture(scope="module")
def checked(commands: dict[Arm, list[str]]) -> tuple[int, list[str]]:
    """What the installed Megatron says to every arm's command, and then to the others: in one process, for time."""
    return check(*(commands[arm] for arm in ARMS), *(command() for command in OTHER_COMMANDS.values()))


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_the_installed_megatron_accepts_every_arm(arm: Arm, checked: tuple[int, list[str]]) -> None:
    verdict = checked[1][ARMS.index(arm)]
    assert verdict.startswith(f"ok: schedule {arm.schedule}, 8 stages of 3 3 3 3 4 4 4 0 layers, "), verdict
    size = arm.global_batch // arm.microbatches
    assert f"{arm.microbatches} micro-batches of {size} sequences per update" in verdict
    assert f"{PAPER_TOKENS:.3g} tokens" in verdict


@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_every_arm_has_the_paper_s_learning_rate_and_length(arm: Arm, commands: dict[Arm, list[str]]) -> None:
    command = commands[arm]
    lr = 3e-4 * math.sqrt(arm.global_batch / 256)
    assert float(value(command, "--lr")) == pytest.approx(lr, rel=1e-6)
    assert float(value(command, "--min-lr")) == pytest.approx(lr / 10, rel=1e-6)
    assert int(value(command, "--train-iters")) == {128: 380_000, 256: 190_000}[arm.global_batch]
    # Evaluated and saved after the same numbers of tokens, and on the same number of them, at both batch sizes.
    for flag, sequences in (("--eval-interval", 256_000), ("--eval-iters", 10_240), ("--save-interval", 256_000)):
        assert int(value(command, flag)) * arm.global_batch == sequences


def test_nothing_but_what_selects_the_arm_changes(commands: dict[Arm, list[str]]) -> None:
    def differing(one: Arm, other: Arm) -> set[str]:
        return {a[0] for a, b in zip(flags(commands[one]), flags(commands[other]), strict=True) if a != b}

    def flags(command: list[str]) -> list[list[str]]:
        return [word.split() for word in re.split(r" (?=--)", " ".join(command))]

    for batch, count in itertools.product((128, 256), (4, 8, 16, 32)):
        flush, paci = Arm("1f1b", batch, count), Arm("paci", batch, count)
        assert differing(flush, paci) == {"--pipeline-schedule"}
        assert differing(paci, Arm("paci", batch, 4)) == (set() if count == 4 else {"--micro-batch-size"})
    assert differing(Arm("paci", 128, 4), Arm("paci", 256, 8)) == {
        *("--global-batch-size", "--train-iters", "--lr", "--min-lr"),
        *("--save-interval", "--save-retain-interval", "--eval-interval", "--eval-iters"),
    }
    folders = {value(printed(arm), "--save") for arm in ARMS}
    assert len(folders) == len(ARMS), "by default each arm has a folder of its own"
    assert value(printed(PACI, SEED="7"), "--save") not in folders


# Where the study goes its own way: it evaluates all arms on the same held-out sequences, at 190 places.
STUDYS_OWN = {"--eval-interval", "--eval-iters", "--save-interval", "--log-interval", "--nproc-per-node"}


def test_the_study_trains_by_the_scripts_recipe() -> None:
    study = SETS["gpt2-medium"]()
    data = placeholder_data(study, "/data/owt")
    for arm in study.arms:
        schedule = "1f1b" if arm.is_flush else "paci"
        script = printed(Arm(schedule, arm.batch_size, arm.microbatches_per_update), DATA_PREFIX="/data/owt")
        command = training_command(study, arm, 1234, data, Path("/data/run"))
        shared = {word for word in command if word.startswith("--")} & set(script) - STUDYS_OWN
        assert "--pipeline-model-parallel-layout" in shared
        assert {
            "--num-layers",
            "--hidden-size",
            "--adam-beta2",
            "--weight-decay",
            "--lr",
            "--train-iters",
            "--rerun-mode",
        } <= shared
        for flag in shared - {"--save", "--load", "--data-cache-path", "--pipeline-schedule"}:
            ours, theirs = (after(words, flag) for words in (command, script))
            assert ours == theirs or float(ours) == pytest.approx(float(theirs), rel=1e-6), (flag, ours, theirs)


def after(command: list[str], flag: str) -> str:
    """The word after ``flag``, or nothing if that is another flag."""
    word = command[command.index(flag) + 1]
    return "" if word.startswith("--") else word


def test_a_dry_run_prints_the_command_and_starts_nothing(tmp_path: Path, commands: dict[Arm, list[str]]) -> None:
    output = tmp_path / "run"
    done = bash(TRAIN, DRY_RUN="1", OUTPUT=str(output), **PACI.environment())
    assert done.returncode == 0, done.stderr
    first, verdict, *notes = done.stdout.splitlines()
    assert shlex.split(first) == [word.replace("/data/run", str(output)) for word in commands[PACI]]
    assert verdict.startswith("ok: schedule paci") and all(note.startswith("  ") for note in notes)
    assert not output.exists()


def test_flags_that_cannot_work_are_found_without_starting(checked: tuple[int, list[str]]) -> None:
    status, verdicts = checked
    assert status == 2
    for pattern, verdict in zip(OTHER_COMMANDS, verdicts[len(ARMS) :], strict=True):
        assert re.match(pattern, verdict), (pattern, verdict)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SCHEDULE": ""}, "SCHEDULE is not set: must be one of: 1f1b paci. Set "),
        ({"SCHEDULE": "gpipe"}, "SCHEDULE=gpipe: must be one of: 1f1b paci. Set "),
        ({"GLOBAL_BATCH": "512"}, "GLOBAL_BATCH=512: must be one of: 128 256. "),
        ({"MICROBATCHES": "12"}, "MICROBATCHES=12: must be one of: 4 8 16 32. "),
        ({"SEED": "0x10"}, "SEED=0x10: must be a whole number from 1 to 999999999. Leave it out "),
        ({"DRY_RUN": "yes"}, "DRY_RUN=yes: must be one of: 0 1 print. Leave it out "),
        (
            {"GPUS_PER_NODE": "6"},
            "GPUS_PER_NODE=6 x NNODES=1 is 6 GPUs: must be a multiple of 8, one for each stage. Change ",
        ),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: must be a whole number from 1. "),
        ({"NNODES": "2"}, "MASTER_ADDR is not set: with NNODES=2 it must be the address of node 0. Set it"),
        ({"NNODES": "3", "NODE_RANK": "3"}, "NODE_RANK=3: must be below NNODES=3. Number the nodes from 0."),
        ({"GPUS_PER_NODE": "24"}, "GLOBAL_BATCH=128 on 3 pipelines of 8 micro-batches: must divide evenly. Use 8 GPUs"),
    ],
)
def test_wrong_values_are_refused_with_a_remedy(variables: dict[str, str], message: str) -> None:
    done = bash(TRAIN, **{**PACI.environment(), "DRY_RUN": "print", **variables})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pretrain_gpt2_medium.sh: error: {message}") and done.stderr.count("\n") == 1, done.stderr


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def token_files(prefix: Path) -> Path:
    """Files that look, from outside, like what prepare_openwebtext.sh writes."""
    for split, kind in itertools.product(("train", "valid"), ("bin", "idx")):
        Path(f"{prefix}_{split}_document.{kind}").touch()
    return prefix


def test_a_launch_that_must_fail_is_refused_before_it_starts(tmp_path: Path) -> None:
    """With an interpreter that counts two GPUs, and otherwise only says how it was called."""
    python = executable(tmp_path / "python", 'if [ "$1" = -c ]; then echo 2; else echo started: "$@"; fi')
    output, prefix = tmp_path / "run", tmp_path / "owt"
    variables = {"PYTHON": str(python), "OUTPUT": str(output), "DATA_PREFIX": str(prefix)}

    def launch(arm: Arm = PACI, /, **more: str) -> subprocess.CompletedProcess[str]:
        done = bash(TRAIN, **arm.environment(), **variables, **more)
        assert ("started: -m torch.distributed.run" in done.stdout) == (done.returncode == 0)
        return done

    assert f"{prefix}_train_document.bin: no such file" in (done := launch()).stderr and done.returncode == 2
    assert f"OUTPUT_PREFIX={prefix} examples/gpt/prepare_openwebtext.sh" in done.stderr
    token_files(prefix)
    assert f"TOKENIZER={prefix}_tokenizer: no such folder" in (done := launch()).stderr and done.returncode == 2
    Path(f"{prefix}_tokenizer").mkdir()
    assert "GPUS_PER_NODE=8: this machine has 2" in (done := launch()).stderr and done.returncode == 2
    assert not output.exists()
    assert launch(ON_CPU="1").returncode == 0
    assert "started: -m torch.distributed.run" in (output / "log-node0.txt").read_text()
    assert launch(ON_CPU="1").returncode == 0, "the same arm again: it resumes"
    done = launch(FLUSH, ON_CPU="1")
    assert done.returncode == 2
    assert f"OUTPUT={output}: holds the arm {PACI}-seed1234, and this one is 1f1b-b128-a8-seed1234" in done.stderr
    # Two GPUs are enough for a node that uses two.
    four_nodes = {"NNODES": "4", "GPUS_PER_NODE": "2", "NODE_RANK": "3", "MASTER_ADDR": "node0"}
    assert launch(**four_nodes).returncode == 0 and (output / "log-node3.txt").is_file()


def test_slurm_starts_one_launcher_on_each_node(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: srun runs its command once for each of two nodes."""
    executable(tmp_path / "scontrol", 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"')
    executable(
        tmp_path / "srun",
        'while [ "${1#--}" != "$1" ]; do shift; done\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    )
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "20007"}
    variables = {**PACI.environment(), **job, "DRY_RUN": "print", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    # As Slurm does, run a copy that lies somewhere else.
    copy = tmp_path / "slurm_script"
    shutil.copy(SLURM, copy)
    done = bash(copy, "--log-interval", "7", **variables, SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [value(line, "--node-rank") for line in lines] == ["0", "1"]
    for line in lines:
        assert [value(line, flag) for flag in ("--nnodes", "--nproc-per-node")] == ["2", "4"]
        assert [value(line, flag) for flag in ("--master-addr", "--master-port")] == ["node7", "20007"]
        assert line[-2:] == ["--log-interval", "7"]
    elsewhere = bash(copy, **variables, SLURM_SUBMIT_DIR=str(tmp_path))
    assert elsewhere.returncode == 2 and "must be the project's root" in elsewhere.stderr
    outside = bash(SLURM, **PACI.environment())
    assert outside.returncode == 2 and "must run in a Slurm job. Submit it with sbatch" in outside.stderr


def test_the_readme_lists_every_arm_with_its_figures() -> None:
    rows: dict[Arm, list[str]] = {}
    for line in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `SCHEDULE="):
            arm, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            schedule, *numbers = (word.partition("=")[2] for word in arm.strip("`").split())
            rows[Arm(schedule, *map(int, numbers))] = cells
    assert sorted(rows) == sorted(ARMS)
    # FLOP per token and stage: four layers' matrices, three times for forward and backward, and causal attention.
    stage = 4 * (6 * 12 * 1024**2 + 3 * 2 * 1024 * 1024)
    for (schedule, batch, count), (size, _, drift, limit, hours) in rows.items():
        flush = schedule == "1f1b"
        gain = speedup_limit(NUM_STAGES, count)
        assert int(size) == batch // count
        most, mean = map(float, drift.split(", "))
        assert most == (0 if flush else max_drift(0, NUM_STAGES, count))
        assert mean == pytest.approx(0 if flush else (NUM_STAGES - 1) / (2 * count), abs=0.006)
        assert float(limit) == pytest.approx(1 if flush else gain, abs=0.001)
        assert int(hours) == round(PAPER_TOKENS * stage / 100e12 / 3600 * (gain if flush else 1))


@pytest.mark.parametrize("script", [TRAIN, SLURM, PREPARE], ids=lambda path: path.name)
def test_scripts_are_sound_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert os.access(script, os.X_OK) and "\nset -euo pipefail\n" in script.read_text()
    if shellcheck := shutil.which("shellcheck"):
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [TRAIN, PREPARE], ids=lambda path: path.name)
def test_help_names_every_variable(script: Path) -> None:
    done = bash(script, "--help")
    assert done.returncode == 0 and done.stdout.count("DRY_RUN") >= 1
    variables = set(re.findall(r"\$\{([A-Z_]+):?-", script.read_text())) - {"OMP_NUM_THREADS"}
    assert variables and all(name in done.stdout for name in variables), done.stdout


@pytest.mark.slow
def test_an_arm_trains_on_its_data_and_resumes(tmp_path: Path, corpus: str) -> None:
    """The real launch, eight processes on a CPU, with a model that is tiny but for its number of layers."""
    for split, kind in itertools.product(("train", "valid"), ("bin", "idx")):
        shutil.copy(f"{corpus}.{kind}", f"{tmp_path}/owt_{split}_document.{kind}")
    tiny = (
        "--hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 --global-batch-size 8 "
        "--micro-batch-size 1 --train-iters 8 --save-interval 4 --save-retain-interval 4 --eval-interval 4 --eval-iters 1 "
        "--log-interval 1 --num-workers 0 --tokenizer-type NullTokenizer --vocab-size 64"
    )
    metrics = tmp_path / "run/metrics.jsonl"

    def run(*arguments: str) -> list[dict[str, Any]]:
        places = {"OUTPUT": str(tmp_path / "run"), "DATA_PREFIX": str(tmp_path / "owt"), "TOKENIZER": str(tmp_path)}
        variables = {"EXTRA_FLAGS": tiny, "ON_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        done = bash(TRAIN, *arguments, **PACI.environment(), **places, **variables)
        assert done.returncode == 0, done.stdout[-3000:]
        return read_metrics(metrics)

    first = run("--exit-interval", "4")
    assert [event["iteration"] for event in first if event["event"] == "train"] == [1, 2, 3, 4]
    rest = run()[len(first) :]
    assert [event["iteration"] for event in rest if event["event"] == "train"] == [5, 6, 7, 8]
    assert {stage["max_drift"] for event in rest if event["event"] == "drain" for stage in event["stages"]} == {0, 1}
    assert any(event["event"] == "evaluation" and event["iteration"] == 8 for event in rest)
