"""Scalars and texts of a folder of TensorBoard's event files."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class Scalar(NamedTuple):
    """A value at a step, written at ``wall_s`` seconds of Unix time."""

    step: int
    wall_s: float
    value: float


@dataclass
class EventFolder:
    """What event files hold, by tag, in the order it was written."""

    scalars: dict[str, list[Scalar]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[str, str] = field(default_factory=dict)


def read_event_folder(folder: Path) -> EventFolder:
    """All event files of a folder, one after the other in the order in which their writers were opened.

    A record cut short, as a kill may leave it, ends its file. ``ValueError`` if there is no event file, or one is something
    else. Needs TensorBoard, which also wrote them.
    """
    # Their names begin with the time they were opened at, in seconds.
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        raise ValueError(f"{folder}: no events.out.tfevents file in it; name the folder that --tensorboard-dir named")
    result = EventFolder()
    for file in files:
        _read(file, result)
    return result


def _read(file: Path, result: EventFolder) -> None:
    from google.protobuf.message import DecodeError
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    try:
        # Values of every kind come as tensors, whatever they were written as.
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                kind = value.metadata.plugin_data.plugin_name
                if kind == "scalars":
                    number = float(make_ndarray(value.tensor).item())
                    result.scalars[value.tag].append(Scalar(event.step, event.wall_time, number))
                elif kind == "text":
                    result.texts[value.tag] = value.tensor.string_val[0].decode(errors="replace")
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a TensorBoard event file; remove it, or name another folder") from error
