"""Checks of where a training command writes, before anything is built: at the first save it would cost the work so far."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from paci_megatron.config import ConfigError
from paci_megatron.telemetry.metrics_file import check_events
from paci_megatron.telemetry.trace_file import trace_path

FOLDERS = ("save", "non_persistent_global_ckpt_dir", "tensorboard_dir", "data_cache_path", "paci_trace_dir")
"""The arguments that name a folder to write in; the last is the plugin's."""


def check_places(args: argparse.Namespace) -> None:
    """``ConfigError`` if a file or folder that the run is to write cannot be, or holds what is not the run's to change."""
    for name in FOLDERS:
        folder = getattr(args, name, None)
        if folder and "://" not in folder:
            _check_folder(f"--{name.replace('_', '-')} {folder}", Path(folder))
    if args.paci_trace_dir:
        num_stages = args.paci_emulate_stages or args.pipeline_model_parallel_size
        for stage in range(num_stages):
            _check_event_file(f"--paci-trace-dir {args.paci_trace_dir}", trace_path(args.paci_trace_dir, stage))
    if args.paci_metrics_file:
        path = Path(args.paci_metrics_file)
        _check_folder(f"--paci-metrics-file {path}", path.parent)
        _check_event_file(f"--paci-metrics-file {path}", path)


def _check_folder(flag: str, folder: Path) -> None:
    """As it is, or as the nearest folder above it in which it can be made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"{flag}: {folder} is not a folder. Give another path.")
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions do not tell: root has them all, on a read-only disk too
            pass
    except OSError as error:
        raise ConfigError(f"{flag}: no file can be made in {folder} ({error.strerror}). Give another path.") from error


def _check_event_file(flag: str, path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder. Give the path of a file.")
    if not path.exists():
        return
    try:
        with open(path, "ab"):
            pass
        if path.is_file():
            check_events(path)
    except OSError as error:
        raise ConfigError(f"{flag}: {path} cannot be written ({error.strerror}). Give another path.") from error
    except ValueError as error:
        raise ConfigError(f"{flag}: {path} is not the run's own file, and left as it is: {error}. Give another.") from error
