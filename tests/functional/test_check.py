"""``paci-megatron check``: an answer for each command, for the machine that it will run on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 --mock-data"
TOKENIZER = (
    "--tokenizer-type NullTokenizer --vocab-size 100 --lr 1e-3 --train-iters 10 --eval-interval 5 --micro-batch-size 1"
)
PACI = f"{MODEL} {TOKENIZER} --global-batch-size 8 --pipeline-model-parallel-size 4 --pipeline-schedule paci"

# In the user guide, the command and its answer.
DOCUMENTED, ANSWER, *_ = (ROOT / "docs/user-guide.md").read_text().partition("## Checking a command")[2].split("```\n")[1::2]

# What is said first, and what belongs to it.
COMMANDS: list[tuple[str, str, list[str]]] = [
    (
        f"torchrun --nproc-per-node 4 pretrain_gpt_paci.py {PACI} --bf16",
        "ok: schedule paci, 4 stages, 8 micro-batches of 1 sequences per update",
        [
            "drift of at most 1 updates (by stage: 1 1 1 0)",
            "speed: at most 1.38 times",
            "clipping: to 1",
            "layers: transformer_",
        ],
    ),
    (
        f"NCCL_DEBUG=INFO srun -N 2 torchrun --nnodes=2 --nproc_per_node=4 -m paci_megatron /home/me/train.py {PACI} --bf16",
        "ok: schedule paci, 4 stages, 2 pipelines, 4 micro-batches",
        [],
    ),
    (
        f"CUDA_DEVICE_MAX_CONNECTIONS=1 python3 -m torch.distributed.run --nproc-per-node 8 x.py {PACI} --bf16 "
        "--tensor-model-parallel-size 2 --sequence-parallel --num-virtual-stages-per-pipeline-rank 2 "
        "--cuda-graph-impl local --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        "ok: schedule paci, 4 stages",
        [
            "--num-virtual-stages-per-pipeline-rank is off",
            "--cuda-graph-impl is off",
            "--masked-softmax-fusion is off: it needs Apex",
        ],
    ),
    (
        f"torchrun --nproc-per-node 4 x.py {PACI} --bf16 --use-megatron-fsdp --paci-extra-in-flight -1 --clip-grad -1",
        "error: 3 reasons:",
        ["--use-megatron-fsdp does not work", "--paci-extra-in-flight -1: must be 0 or a number", "--clip-grad -1.0: must"],
    ),
    (
        f"torchrun --nproc-per-node 4 x.py {PACI} --bf16".replace(
            "--global-batch-size 8", "--step-batch-size-schedule 0:1,128:4"
        ),
        "ok: schedule paci, 4 stages, 1 micro-batches of 1 sequences per update at the beginning",
        [
            "up to 3 updates with 1 micro-batches, and 1 from iteration 3 on with 4",
            "flush until then with --paci-start-iteration 2, 20",
        ],
    ),
    (DOCUMENTED.partition(" -- ")[2].replace("\\\n", " ").strip(), "ok: ", []),
    (f"torchrun --nproc-per-node auto x.py {PACI}", "error: --nproc-per-node auto: the number is not known here", []),
    (f"torchrun --nproc-per-node 4 x.py {PACI} --no-such-flag", "error: unrecognized arguments: --no-such-flag", []),
    ("./launch.sh", "error: ./launch.sh ...: not a torchrun command", []),
]


@pytest.fixture(scope="module")
def answers() -> list[list[str]]:
    """The lines that belong to each command, all checked in one process that assumes a GPU and Transformer Engine."""
    command = [sys.executable, "-m", "paci_megatron.cli.main", "check", "--assume", "gpu,te"]
    text = "\n".join(line for line, _, _ in COMMANDS)
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.returncode == 2, done.stderr
    found: list[list[str]] = []
    for line in done.stdout.splitlines():
        if line.startswith(("ok: ", "error: ")):
            found.append([])
        found[-1].append(line)
    assert len(found) == len(COMMANDS), done.stdout + done.stderr
    return found


@pytest.mark.parametrize("index", range(len(COMMANDS)))
def test_each_command_has_its_answer(answers: list[list[str]], index: int) -> None:
    _, first, others = COMMANDS[index]
    lines = answers[index]
    assert lines[0].startswith(first), lines
    for other in others:
        assert any(other in line for line in lines), (other, lines)
    assert not any("no CUDA device" in line for line in lines), "it is not this machine that was asked about"


def test_the_answer_in_the_user_guide_is_this_one(answers: list[list[str]]) -> None:
    (index,) = (at for at, (command, _, _) in enumerate(COMMANDS) if "--timing-log-level 2" in command)
    assert answers[index] == ANSWER.splitlines()
