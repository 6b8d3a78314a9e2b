"""Looks at the checkpoint that a command is to load, before anything is built: is it all there, and if not, which one is?

Megatron finds a broken checkpoint out in the middle of loading it, in terms of its readers, or ends with status 0.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections import defaultdict
from pathlib import Path

from paci_megatron.config import ConfigError

TRACKER = "latest_checkpointed_iteration.txt"


def check_load(args: argparse.Namespace) -> None:
    """``ConfigError`` unless what ``--load`` is to load is complete, or there is nothing yet and training begins anew.

    Of other formats than torch_dist and torch nothing is known here, and nothing said.
    """
    if not args.load or "://" in args.load or getattr(args, "non_persistent_ckpt_type", None):
        return  # object storage; or Megatron chooses among several places
    if args.ckpt_format not in ("torch_dist", "torch"):
        return
    folder = Path(args.load)
    if getattr(args, "pretrained_checkpoint", None) and not (folder / TRACKER).is_file():
        folder = Path(args.pretrained_checkpoint)
    tracker = folder / TRACKER
    checkpoint = to_load(folder, args.ckpt_step)
    if checkpoint is not None:
        _require_complete(folder, checkpoint, f"--ckpt-step {args.ckpt_step}" if args.ckpt_step else f"{TRACKER} names it")
    elif (last := last_complete(folder)) is not None:
        raise ConfigError(f"{tracker}: no such file, but the checkpoint of iteration {last} is there. {_remedy(folder)}")
    elif getattr(args, "exit_on_missing_checkpoint", False):
        raise ConfigError(f"--load {folder} --exit-on-missing-checkpoint: there is no checkpoint. Give another folder.")


def to_load(folder: Path, step: int | None) -> Path | None:
    """Where the checkpoint is that Megatron loads from ``folder``, with ``--ckpt-step`` or without; None if it names none.

    ``ConfigError`` if the file that names the latest names no iteration: Megatron reads it in any case, and ends.
    """
    tracker, text = folder / TRACKER, None
    if tracker.is_file():
        text = tracker.read_text(errors="replace").strip()
        if text != "release" and not text.isdecimal():
            found = f"it says {text[:40]!r}" if text else "it is empty"
            raise ConfigError(f"{tracker} does not name an iteration: {found}. {_remedy(folder)}")
    if step:
        return iteration_folder(folder, step)
    if text is None:
        return None
    return folder / "release" if text == "release" else iteration_folder(folder, int(text))


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where Megatron keeps the checkpoint of ``iteration``."""
    return folder / f"iter_{iteration:07d}"


def last_complete(folder: Path) -> int | None:
    """The highest iteration of which ``folder`` has a checkpoint without :func:`fault`."""
    iterations = (path.name.removeprefix("iter_") for path in folder.glob("iter_*"))
    numbers = sorted((int(text) for text in iterations if text.isdecimal()), reverse=True)
    return next((number for number in numbers if fault(iteration_folder(folder, number)) is None), None)


def fault(folder: Path) -> str | None:
    """What is wrong with one checkpoint: the file, and how; None if it has all that its index names.

    Known are Megatron's formats torch_dist, its default, and torch.
    """
    if not folder.is_dir():
        return f"{folder}: no such folder"
    if any(folder.glob("mp_rank_*")):
        files = sorted(folder.glob("mp_rank_*/*.pt"))
        return next((cut for file in files if (cut := _cut_archive(file))), None) if files else f"{folder}: no file in it"
    try:
        about = json.loads((folder / "metadata.json").read_text())
    except FileNotFoundError:
        return f"{folder}/metadata.json: no such file"
    except ValueError:
        return f"{folder}/metadata.json: not JSON"
    if not isinstance(about, dict) or about.get("sharded_backend") != "torch_dist":
        return None
    common = folder / "common.pt"  # of Megatron before 0.19
    return _cut_archive(common) if common.exists() and _cut_archive(common) else _fault_of_shards(folder)


def _fault_of_shards(folder: Path) -> str | None:
    """By PyTorch's index, which tells where in which file each part of each tensor is."""
    index = folder / ".metadata"
    try:
        with open(index, "rb") as file:
            parts = pickle.load(file).storage_data.values()
    except FileNotFoundError:
        return f"{index}: no such file (names that begin with a dot are left out by cp *)"
    except Exception:
        return f"{index}: cannot be read, as if cut short"
    ends: dict[str, int] = defaultdict(int)
    for part in parts:
        ends[part.relative_path] = max(ends[part.relative_path], part.offset + part.length)
    for name, end in sorted(ends.items()):
        shard = folder / name
        if not shard.is_file():
            return f"{shard}: no such file"
        if (size := shard.stat().st_size) < end:
            return f"{shard}: {size} bytes, and the checkpoint's index needs {end}"
    return None


def _cut_archive(path: Path) -> str | None:
    """PyTorch's files end with a table of what is in them."""
    return None if zipfile.is_zipfile(path) else f"{path}: cut short, or no file of PyTorch's"


def _require_complete(folder: Path, checkpoint: Path, why: str) -> None:
    found = fault(checkpoint)
    if found is not None:
        raise ConfigError(f"{found}; so the checkpoint to load ({why}) is not complete. {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    last = last_complete(folder)
    if last is None:
        return f"No checkpoint in {folder} is complete: restore it, or begin anew with an empty folder."
    return f"The last complete one is of iteration {last}: to go on from it, echo {last} > {folder / TRACKER}"
