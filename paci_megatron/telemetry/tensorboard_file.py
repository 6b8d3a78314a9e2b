"""Scalars and texts from TensorBoard's event files, read without TensorBoard.

A file is a sequence of records, each a length, a checksum of it, that many bytes, and a checksum of these. The bytes are an
``Event`` in protocol buffer encoding; of its fields the few below are used.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Field numbers: of Event, of its Summary, of the Summary's values, and of a value's TensorProto.
_WALL_TIME, _STEP, _SUMMARY = 1, 2, 5
_VALUE = 1
_TAG, _SIMPLE_VALUE, _TENSOR = 1, 2, 8
_FLOAT_VALUES, _STRING_VALUES = 5, 8

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
    else.
    """
    # Their names begin with the time they were opened at, in seconds.
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        raise ValueError(f"{folder}: no events.out.tfevents file in it; name the folder that --tensorboard-dir named")
    result = EventFolder()
    for file in files:
        try:
            for record in _records(file.read_bytes()):
                _add_event(record, result)
        except (struct.error, IndexError, UnicodeDecodeError, _EncodingError) as error:
            raise ValueError(f"{file}: not a TensorBoard event file; remove it, or name another folder") from error
    return result


class _EncodingError(Exception):
    """Bytes that no protocol buffer has."""


def _records(data: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        begin = offset + 12
        if begin + length + 4 > len(data):
            return
        yield data[begin : begin + length]
        offset = begin + length + 4


def _add_event(record: bytes, result: EventFolder) -> None:
    """Add what an Event holds to ``result``."""
    wall_s, step = 0.0, 0
    summaries = []
    for number, value in _fields(record):
        if number == _WALL_TIME:
            (wall_s,) = struct.unpack("<d", value)
        elif number == _STEP:
            step = value
        elif number == _SUMMARY:
            summaries.append(value)
    for summary in summaries:
        for number, value in _fields(summary):
            if number == _VALUE:
                _add_value(value, step, wall_s, result)


def _add_value(message: bytes, step: int, wall_s: float, result: EventFolder) -> None:
    """Add a Summary's value, a number or a text, to ``result``; other kinds are left out."""
    tag, number_found, text = "", None, None
    for number, value in _fields(message):
        if number == _TAG:
            tag = value.decode()
        elif number == _SIMPLE_VALUE:
            (number_found,) = struct.unpack("<f", value)
        elif number == _TENSOR:
            for tensor_field, content in _fields(value):
                if tensor_field == _FLOAT_VALUES:
                    (number_found,) = struct.unpack("<f", content[:4])
                elif tensor_field == _STRING_VALUES:
                    text = content.decode(errors="replace")
    if number_found is not None:
        result.scalars[tag].append(Scalar(step, wall_s, number_found))
    elif text is not None:
        result.texts[tag] = text


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A message's fields as (number, value): an integer, or the bytes of anything else."""
    offset = 0
    while offset < len(message):
        key, offset = _varint(message, offset)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, offset = _varint(message, offset)
            yield number, value
            continue
        if kind == _BYTES:
            size, offset = _varint(message, offset)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise _EncodingError(kind)
        if offset + size > len(message):
            raise _EncodingError(size)
        yield number, message[offset : offset + size]
        offset += size


def _varint(message: bytes, offset: int) -> tuple[int, int]:
    """The integer at ``offset``, seven bits a byte, lowest first, and the offset behind it."""
    value = shift = 0
    while True:
        byte = message[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, offset
