"""Which checkpoint and tokenizer an evaluation takes, and what it refuses."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from paci_megatron.cli import evaluate
from paci_megatron.config import ConfigError
from paci_megatron.evaluate.checkpoint_args import (
    TOKENIZER_ARGUMENTS,
    _tokenizer_arguments,
    check_checkpoint,
    model_arguments,
)
from paci_megatron.evaluate.evaluator import _no_exit
from paci_megatron.plugin.checkpoints import TRACKER
from tests.conftest import MegatronDefaults


def test_checkpoint_arguments_are_megatrons(megatron_defaults: MegatronDefaults) -> None:
    names = model_arguments(megatron_defaults.values)
    assert {"hidden_size", "layernorm_epsilon", "qk_layernorm", "use_rope_scaling", "bias_gelu_fusion"} <= set(names)
    assert not {"recompute_granularity", "tensor_model_parallel_size", "transformer_impl", "cuda_graph_impl"} & set(names)
    assert all(hasattr(megatron_defaults.values, name) for name in TOKENIZER_ARGUMENTS)


def test_own_flags_are_not_megatrons(megatron_defaults: MegatronDefaults) -> None:
    own = {flag for action in evaluate._parser("")._actions for flag in action.option_strings}
    assert own & megatron_defaults.flags == {"-h", "--help"}


@pytest.mark.parametrize(
    ("load", "step", "message"),
    [
        (None, None, "--load is missing"),
        ("nowhere", None, "nowhere: no such folder"),
        (".", None, "no latest_checkpointed_iteration.txt"),
        (".", 30, "--ckpt-step 30: not in .*has iterations 20"),
        ("iter_0000020", None, "--ckpt-step 20"),
    ],
)
def test_missing_checkpoints_are_refused(tmp_path: Path, load: str | None, step: int | None, message: str) -> None:
    (tmp_path / "iter_0000020").mkdir()
    with pytest.raises(ConfigError, match=message):
        check_checkpoint(load and str(tmp_path / load), step)


def write_checkpoint(folder: Path, iteration: int) -> Path:
    """A checkpoint in Megatron's default format; the latest."""
    target = folder / f"iter_{iteration:07d}"
    dcp.save({"a": torch.arange(1000.0)}, checkpoint_id=target)
    (target / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return target


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty tracker": (lambda c: (c.parent / TRACKER).write_text(""), "does not name an iteration: it is empty"),
    "garbage": (lambda c: (c.parent / TRACKER).write_text("garbage"), "does not name an iteration: it says 'garbage'"),
    "tracker of nothing": (
        lambda c: (c.parent / TRACKER).write_text("99"),
        "iter_0000099: no such folder; so the checkpoint",
    ),
    "no index": (
        lambda c: (c / ".metadata").unlink(),
        r"\.metadata: no such file .*The last complete one is of iteration 10",
    ),
    "no metadata.json": (lambda c: (c / "metadata.json").unlink(), r"metadata\.json: no such file"),
    "cut metadata.json": (lambda c: os.truncate(c / "metadata.json", 5), r"metadata\.json: not JSON"),
    "list": (
        lambda c: (c / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "in the format zarr, and only torch_dist",
    ),
    "cut shard": (lambda c: os.truncate(next(c.glob("*.distcp")), 50), "50 bytes, and the checkpoint's index needs"),
    "torch": (lambda c: (c / "mp_rank_00").mkdir(), "in the format torch, and only torch_dist, the default, is evaluated"),
    "torch, tensor parallel": (
        lambda c: (c / "mp_rank_00_001").mkdir(),
        "in the format torch, .*--ckpt-convert-format torch_dist",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=list(BROKEN))
def test_broken_checkpoints_are_refused(tmp_path: Path, break_it: Callable[[Path], Any], message: str) -> None:
    write_checkpoint(tmp_path, 10)
    checkpoint = write_checkpoint(tmp_path, 20)
    check_checkpoint(str(tmp_path), None)
    check_checkpoint(str(tmp_path), 10)
    break_it(checkpoint)
    with pytest.raises(ConfigError, match=message) as caught:
        check_checkpoint(str(tmp_path), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [None, 0, 1, 2])
def test_megatron_does_not_end_the_program(code: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(ConfigError, match=r"Megatron ended the evaluation: ERROR: Invalid metadata file\. Correct that"),
        _no_exit(False),
    ):
        print("loading\nERROR: Invalid metadata file\n")
        sys.exit(code)
    with pytest.raises(ConfigError, match="it gave no reason"), _no_exit(False):
        sys.exit(code)
    with pytest.raises(ConfigError, match="out of paper"), _no_exit(False):
        sys.exit("out of paper")
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="see above"), _no_exit(True):
        print("why")
        sys.exit(code)
    assert capsys.readouterr().out == "why\n"


@pytest.mark.parametrize(
    ("given", "type_", "taken"),
    [
        (set(), None, TOKENIZER_ARGUMENTS),
        ({"tokenizer_model"}, None, TOKENIZER_ARGUMENTS),
        ({"tokenizer_type"}, "SentencePieceTokenizer", TOKENIZER_ARGUMENTS),
        ({"tokenizer_type"}, "HuggingFaceTokenizer", ("tokenizer_model",)),
        ({"tokenizer_type", "vocab_file"}, "GPT2BPETokenizer", ("vocab_file", "merge_file")),
    ],
)
def test_what_is_not_given_of_the_tokenizer_is_the_checkpoints(
    given: set[str], type_: str | None, taken: tuple[str, ...]
) -> None:
    saved = argparse.Namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model="old.model")
    assert _tokenizer_arguments(argparse.Namespace(tokenizer_type=type_), saved, given) == taken


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/x.json", "no folder {folder}/no; make it first"),
        (".", "a folder; give the path of a file"),
        ("file/x.json", "no folder {folder}/file; make it first"),
        ("/proc/x.json", "cannot be written ("),
        ("/proc/version", "cannot be written ("),
    ],
)
def test_output_is_looked_at_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "file").write_text("kept")
    output = tmp_path / name
    assert evaluate.main(["--input", "x", "--output", str(output)], "evaluate_perplexity.py") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"evaluate_perplexity.py: error: --output {output}: " + message.format(folder=tmp_path))
    assert error.count("\n") == 1 and (tmp_path / "file").read_text() == "kept"
