"""The commands of a study: its data, and one training for each arm and seed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arms import Arm, Study, StudyError

PREPROCESS = "tools/preprocess_data.py"
TRAIN = "pretrain_gpt_paci.py"
TRAIN_BY_STAGE = ("-m", "lab.study.by_stage")


@dataclass(frozen=True)
class Data:
    """Token ids and tokenizer. ``eval_sequences`` are what one evaluation reads."""

    train_path: str
    valid_path: str
    tokenizer_flags: tuple[str, ...]
    eval_sequences: int


def preprocess_commands(study: Study, folder: Path, text: list[Path], valid_text: list[Path]) -> list[list[str]]:
    """What makes the token ids in ``folder`` from files of text, with a vocabulary of their own.

    Without ``valid_text`` documents of ``text`` are held out.
    """
    tokenizer = ["--train-tokenizer", "--vocab-size", str(study.vocab_size)]
    train = [PREPROCESS, "--input", *map(str, text), "--output-prefix", str(folder / "text"), "--workers", "2", *tokenizer]
    if not valid_text:
        return [[*train, "--held-out-fraction", str(study.held_out_fraction)]]
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "text_tokenizer.model")]
    valid = [
        PREPROCESS,
        "--input",
        *map(str, valid_text),
        "--output-prefix",
        str(folder / "valid"),
        "--workers",
        "2",
        *model,
    ]
    return [train, valid]


def prepared_data(study: Study, folder: Path, has_valid_text: bool) -> Data:
    """The data that :func:`preprocess_commands` made."""
    prefix, valid = str(folder / "text"), str(folder / ("valid" if has_valid_text else "text"))
    train_path, valid_path = (f"{prefix}_text_document", f"{valid}_text_document")
    if not has_valid_text:
        train_path, valid_path = (f"{prefix}_train_document", f"{prefix}_valid_document")
    stats = json.loads(Path(f"{valid}_stats.json").read_text(encoding="utf-8"))
    num_tokens = stats["splits"]["text" if has_valid_text else "valid"]["num_tokens"]
    flags = tuple(stats["tokenizer_flags"])
    return Data(train_path, valid_path, flags, _eval_sequences(study, num_tokens))


def existing_data(study: Study, prefix: str) -> Data:
    """Data made before by ``preprocess_data.py --output-prefix PREFIX --held-out-fraction ...``."""
    stats_path = Path(f"{prefix}_stats.json")
    if not stats_path.exists():
        raise StudyError(
            f"--data-prefix {prefix}: there is no {stats_path}; make the data with {PREPROCESS} --output-prefix {prefix} "
            f"--held-out-fraction {study.held_out_fraction}"
        )
    stats = json.loads(stats_path.read_text(encoding="utf-8"))
    if "valid" not in stats["splits"]:
        raise StudyError(f"--data-prefix {prefix}: it has no held-out documents; make it with --held-out-fraction")
    sequences = _eval_sequences(study, stats["splits"]["valid"]["num_tokens"])
    flags = tuple(stats["tokenizer_flags"])
    return Data(f"{prefix}_train_document", f"{prefix}_valid_document", flags, sequences)


def placeholder_data(study: Study, prefix: str) -> Data:
    """What commands look like before the data is there, for a dry run."""
    if study.is_paper:
        flags: tuple[str, ...] = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{prefix}_tokenizer")
    else:
        flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}_tokenizer.model")
    sequences = study.eval_sequences or _largest_micro_batch(study) * 16
    return Data(f"{prefix}_train_document", f"{prefix}_valid_document", flags, sequences)


def _largest_micro_batch(study: Study) -> int:
    return max(arm.micro_batch_size for arm in study.arms)


def _eval_sequences(study: Study, num_tokens: int) -> int:
    """All held-out tokens, or the study's own limit, in whole micro-batches of every arm."""
    unit = _largest_micro_batch(study)
    available = (num_tokens - 1) // study.seq_length
    sequences = min(available, study.eval_sequences or available) // unit * unit
    if not sequences:
        raise StudyError(
            f"{num_tokens} held-out tokens: an evaluation needs at least {unit} sequences of {study.seq_length} tokens; "
            "hold out more text"
        )
    return sequences


def training_command(study: Study, arm: Arm, seed: int, data: Data, folder: Path) -> list[str]:
    """The arm's training after the name of the Python interpreter, without its metrics file. It resumes by itself."""
    # The held-out documents are the test set, too: its one evaluation, after training, reads each sequence once, and so
    # the same in every run. Those during training read random sequences.
    processes = 1 if study.is_emulated else study.num_stages
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [*TRAIN_BY_STAGE, arm.by_stage] if arm.by_stage else [TRAIN]
    for flag, value in _flags(study, arm, seed, data).items():
        command += [f"--{flag}"] if value is None else [f"--{flag}", str(value)]
    checkpoints = str(folder / "checkpoints")
    command += [*data.tokenizer_flags, "--train-data-path", data.train_path, "--valid-data-path", data.valid_path]
    # An index of its own: runs that start together would write the same files.
    command += ["--test-data-path", data.valid_path, "--data-cache-path", str(folder / "index-cache")]
    command += ["--save", checkpoints, "--load", checkpoints]
    return command if arm.is_flush else [*command, "--pipeline-schedule", arm.schedule]


def _flags(study: Study, arm: Arm, seed: int, data: Data) -> dict[str, Any]:
    iterations = study.train_iters(arm)
    period = iterations // study.num_periods
    lr = study.lr(arm)
    stages = study.num_stages * (arm.stages_per_process if study.is_emulated else 1)
    flags: dict[str, Any] = {
        "paci-emulate-stages" if study.is_emulated else "pipeline-model-parallel-size": stages,
        **study.flags,
        "seq-length": study.seq_length,
        "max-position-embeddings": study.seq_length,
        "micro-batch-size": arm.micro_batch_size,
        "global-batch-size": arm.batch_size,
        "train-iters": iterations,
        "lr": lr,
        "min-lr": float(f"{lr / 10:.6g}"),
        "adam-beta1": arm.beta1,
        "clip-grad": arm.clip_grad,
        "seed": seed,
        "log-interval": period // study.logs_per_period,
        "eval-interval": period,
        "save-interval": period,
        "eval-global-batch-size": data.eval_sequences,
        "eval-iters": 1,
        "eval-micro-batch-size": _largest_micro_batch(study),
    }
    if arm.optimizer != "adam":
        flags["optimizer"] = arm.optimizer
    if arm.start_fraction:
        flags["paci-start-iteration"] = round(arm.start_fraction * iterations)
    if arm.weight_policy != "latest":
        flags["paci-weight-policy"] = arm.weight_policy
    if arm.bf16:
        flags["bf16"] = None
    if arm.look_ahead:
        flags["paci-look-ahead"] = None
    if arm.recompute:
        flags |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    return flags
