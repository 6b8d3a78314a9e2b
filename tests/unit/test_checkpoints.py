"""A checkpoint that is not all there is named before anything is built, with the last one that is."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from paci_megatron.config import ConfigError
from paci_megatron.plugin.checkpoints import TRACKER, check_load, fault, iteration_folder, last_complete


def namespace(folder: Path, **changes: Any) -> argparse.Namespace:
    """Arguments that load from ``folder``, with changes."""
    return argparse.Namespace(**{"load": str(folder), "ckpt_step": None, "ckpt_format": "torch_dist", **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of iterations 10, 20 and 30, as PyTorch and Megatron lay them out."""
    for iteration in (10, 20, 30):
        target = iteration_folder(tmp_path, iteration)
        dcp.save({"a": torch.arange(1000.0), "b": torch.ones(3, 3)}, checkpoint_id=target)
        (target / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (tmp_path / TRACKER).write_text("30")
    return tmp_path


def refusal(args: argparse.Namespace) -> str:
    """Of what is to be loaded; empty if it is accepted."""
    try:
        check_load(args)
    except ConfigError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_what_is_complete_is_accepted(folder: Path) -> None:
    assert refusal(namespace(folder)) == refusal(namespace(folder, ckpt_step=10)) == ""
    assert last_complete(folder) == 30
    assert refusal(namespace(folder / "new")) == "", "a first start"
    assert refusal(namespace(Path("msc://bucket/run"))) == ""
    (iteration_folder(folder, 20) / "metadata.json").unlink()
    assert refusal(namespace(folder, ckpt_step=20, ckpt_format="fsdp_dtensor")) == "", "another format"
    (folder / "iter_new").mkdir()
    iteration_folder(folder, 30).rename(folder / "release")
    (folder / TRACKER).write_text("release\n")
    assert refusal(namespace(folder)) == ""


def shard(checkpoint: Path) -> Path:
    """One that holds something."""
    return next(checkpoint.glob("*.distcp"))


def emptied(checkpoint: Path) -> None:
    """All its files are gone."""
    for path in checkpoint.iterdir():
        path.unlink()


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda c: (c / ".metadata").unlink(), r"/\.metadata: no such file \(.*cp \*\)"),
    "cut index": (lambda c: os.truncate(c / ".metadata", 100), r"/\.metadata: cannot be read, as if cut short"),
    "empty index": (lambda c: os.truncate(c / ".metadata", 0), r"/\.metadata: cannot be read"),
    "cut shard": (lambda c: os.truncate(shard(c), 50), r"distcp: 50 bytes, and the checkpoint's index needs \d+"),
    "no shard": (lambda c: shard(c).unlink(), r"distcp: no such file"),
    "no metadata.json": (lambda c: (c / "metadata.json").unlink(), r"/metadata\.json: no such file"),
    "empty metadata.json": (lambda c: os.truncate(c / "metadata.json", 0), r"/metadata\.json: not JSON"),
    "cut common.pt": (lambda c: (c / "common.pt").write_bytes(b"PK"), r"/common\.pt: cut short"),
    "empty folder": (emptied, r"/metadata\.json: no such file"),
    "no folder": (shutil.rmtree, r"iter_0000030: no such folder"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_named_with_the_last_complete_one(folder: Path, kind: str) -> None:
    break_it, message = BROKEN[kind]
    for iteration, last in ((30, 20), (20, 10), (10, None)):
        break_it(iteration_folder(folder, iteration))
        if iteration == 30:
            with pytest.raises(ConfigError, match=message):
                check_load(namespace(folder))
        said = refusal(namespace(folder))
        assert (f"The last complete one is of iteration {last}: to go on from it, echo {last} > " in said) == bool(last)
    assert "No checkpoint in " in said


def test_a_tracker_that_is_offered_is_accepted(folder: Path) -> None:
    os.truncate(shard(iteration_folder(folder, 30)), 50)
    for broken in ("", "garbage\n", "30 20", "-30", "1e3", "30"):
        (folder / TRACKER).write_text(broken)
        said = refusal(namespace(folder))
        assert str(folder / TRACKER) in said and said.endswith(f"echo 20 > {folder / TRACKER}")
        assert os.system(said.rsplit(", ", 1)[-1]) == 0
        assert refusal(namespace(folder)) == ""


def test_a_broken_tracker_ends_megatron_with_a_given_iteration_too(folder: Path) -> None:
    (folder / TRACKER).write_text("")
    assert "it is empty" in refusal(namespace(folder, ckpt_step=20))


def test_a_lost_tracker_does_not_begin_anew_in_silence(folder: Path) -> None:
    (folder / TRACKER).unlink()
    said = refusal(namespace(folder))
    assert f"{TRACKER}: no such file, but the checkpoint of iteration 30 is there. The last complete" in said
    assert refusal(namespace(folder, ckpt_step=20)) == ""
    assert "--ckpt-step 25" in refusal(namespace(folder, ckpt_step=25))


def test_where_a_checkpoint_must_be(tmp_path: Path) -> None:
    assert "there is no checkpoint" in refusal(namespace(tmp_path, exit_on_missing_checkpoint=True))


def test_the_older_format_is_looked_at_too(tmp_path: Path) -> None:
    for iteration in (1, 2):
        target = iteration_folder(tmp_path, iteration) / "mp_rank_00"
        target.mkdir(parents=True)
        torch.save({"a": torch.ones(100)}, target / "model_optim_rng.pt")
    (tmp_path / TRACKER).write_text("2")
    assert refusal(namespace(tmp_path)) == ""
    os.truncate(iteration_folder(tmp_path, 2) / "mp_rank_00" / "model_optim_rng.pt", 300)
    said = refusal(namespace(tmp_path))
    assert "model_optim_rng.pt: cut short" in said and "iteration 1:" in said
    assert fault(iteration_folder(tmp_path, 1)) is None
