"""Whole commands as a user types them, through torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--untie-embeddings-and-output-weights"),
    *("--seq-length", "16", "--max-position-embeddings", "16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "64"),
    *(
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "4",
        "--lr",
        "5e-3",
        "--lr-decay-style",
        "constant",
        "--clip-grad",
        "0",
    ),
    *("--eval-interval", "100", "--eval-iters", "1", "--log-interval", "1", "--num-workers", "0"),
]


# No torch.compile: each process would spend ten seconds on Megatron's small fused functions.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}


def torchrun(*command: str, processes: int = 2, timeout_s: int = 180) -> subprocess.CompletedProcess[str]:
    """Run ``command`` on that many processes from the repository's root."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(
        [*launcher, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout_s
    )


def losses(output: str, name: str) -> list[str]:
    """The losses on Megatron's log lines, as printed."""
    return re.findall(rf" iteration .*\| {name}: (\S+) ", output)


def test_any_script_runs_unmodified_under_the_module() -> None:
    script = [str(ROOT / "tests/functional/any_script.py"), *MODEL, "--train-iters", "30", "--greeting", "hello"]
    plain = torchrun("-m", "paci_megatron", *script, "--pipeline-model-parallel-size", "2")
    assert plain.returncode == 0, plain.stderr[-3000:]
    paci = torchrun("-m", "paci_megatron", *script, "--pipeline-model-parallel-size", "2", "--pipeline-schedule", "paci")
    assert paci.returncode == 0, paci.stderr[-3000:]
    assert "greeting: hello" in paci.stdout
    assert "schedule paci: 2 stages, 2 micro-batches per update, drift of at most 1 updates" in paci.stdout
    assert "paci, drained after iteration       30 | 30 updates | by stage: max drift 1 0" in paci.stdout
    before, after = losses(plain.stdout, "counting loss"), losses(paci.stdout, "counting loss")
    assert len(before) == len(after) == 30
    assert before[0] == after[0] and before[-1] != after[-1]
    assert float(after[-1]) < 0.8 * float(after[0]), "it learns"


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
    done = torchrun(
        *("-m", "paci_megatron", str(script), *MODEL, "--train-iters", "1000", "--pipeline-model-parallel-size", "2"),
        *("--pipeline-schedule", "paci"),
        timeout_s=120,
    )
    assert done.returncode != 0
    assert "the ninth micro-batch is cursed" in done.stderr


def test_a_bad_command_line_gets_one_line_and_no_training() -> None:
    done = torchrun(
        *("pretrain_gpt_paci.py", *MODEL, "--train-iters", "4", "--mock-data", "--pipeline-model-parallel-size", "2"),
        *("--pipeline-schedule", "paci", "--fp16"),
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("paci-megatron: error: ")]
    assert len(lines) == 1 and "--fp16 does not work with --pipeline-schedule paci" in lines[0]
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
    assert not re.search(r" iteration +\d", done.stdout)


def test_megatrons_memory_estimate_is_of_one_stage_with_all_its_micro_batches() -> None:
    command = [
        *("pretrain_gpt_paci.py", *MODEL, "--global-batch-size", "2", "--mock-data", "--train-iters", "2"),
        *("--paci-emulate-stages", "2", "--use-distributed-optimizer"),
    ]
    paci = torchrun(*command, "--pipeline-schedule", "paci", processes=1)
    assert paci.returncode == 0, paci.stderr[-3000:]
    assert "Number of in-flight microbatches: 2" in paci.stdout, "N, with one micro-batch in an update"
    flush = torchrun(*command, processes=1)
    assert flush.returncode == 0, flush.stderr[-3000:]
    assert "Number of in-flight microbatches: 1" in flush.stdout


def test_usage_of_the_module() -> None:
    def module(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paci_megatron", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert module("--help").returncode == 0 and module("--help").stdout.startswith("usage: torchrun")
    nothing = module()
    assert nothing.returncode == 2 and nothing.stderr.startswith("usage: ")
    missing = module("no/such/script.py")
    assert missing.returncode == 2 and "no/such/script.py: no such file" in missing.stderr
