"""TensorBoard's event files, read fast.

TensorBoard's own reader keeps an object for every value. Here a file is a stream of records, of which scalars go into
arrays at once; what is neither a scalar nor a record of ours is skipped unread.
"""

from __future__ import annotations

import json
import re
import struct
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .run import RECORD_PLUGIN, RECORD_TAG

Columns = tuple["array[float]", "array[int]", "array[float]"]
Series = dict[str, tuple[list[int], list[float]]]
Records = tuple[tuple[int, dict[str, Any]], ...]


def read_folder(folder: Path) -> tuple[Series, Records]:
    """The scalars and records in the event files of a folder.

    Returns:
        Steps and values by tag, in the order of steps, of several values for a step the last written; and records by
        steps, likewise.
    """
    columns: dict[bytes, Columns] = {}
    records: list[tuple[float, int, str]] = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for payload in _frames(path):
            if not _read_scalar(payload, columns):
                _read_event(payload, columns, records)
    # Files come by their names, in which 10 sorts before 9; what counts is when a value was written.
    series = {tag.decode(): _in_order(*column) for tag, column in columns.items()}
    in_order = sorted(records, key=lambda record: (record[1], record[0]))
    return series, tuple((step, json.loads(text)) for _, step, text in in_order)


def record_summary(record: Mapping[str, Any]) -> Any:
    """A record as a summary of TensorBoard, which shows nothing of it, since no plugin of its has that name."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    tensor = TensorProto(dtype="DT_STRING", string_val=[json.dumps(record).encode()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=RECORD_PLUGIN))
    return Summary(value=[Summary.Value(tag=RECORD_TAG, tensor=tensor, metadata=metadata)])


def _in_order(times: array[float], steps: array[int], values: array[float]) -> tuple[list[int], list[float]]:
    at, when, x = np.asarray(steps), np.asarray(times), np.asarray(values)
    order = np.lexsort((np.arange(len(at)), when, at))
    at, x = at[order], x[order]
    last = np.append(at[1:] != at[:-1], True) if len(at) else np.zeros(0, bool)
    return at[last].tolist(), x[last].tolist()


def _frames(path: Path) -> Iterator[bytes]:
    """The payloads of a file: length (8 bytes), its checksum (4), payload, its checksum (4).

    The last one may not be complete yet, where a run is being written.
    """
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack_from("<Q", head)
            payload = file.read(length + 4)
            if len(payload) < length + 4:
                return
            yield payload[:length]


#: An event with one scalar, as ``SummaryWriter.add_scalar`` writes it: nearly all events are. The lengths before the
#: summary, the value and the tag are one byte each.
_SCALAR = re.compile(rb"\x09(.{8})(?:\x10([\x80-\xff]*[\x00-\x7f]))?\x2a.\x0a.\x0a(.)(.*)\x15(.{4})", re.DOTALL)


def _read_scalar(payload: bytes, columns: dict[bytes, Columns]) -> bool:
    """Read an event that is laid out as most are; false for any other."""
    match = _SCALAR.fullmatch(payload)
    if match is None:
        return False
    time, varint, size, tag, value = match.groups()
    if size[0] != len(tag) or len(tag) > 100 or payload[-len(tag) - 9] != len(tag) + 7:
        return False
    column = columns.get(tag) or columns.setdefault(tag, (array("d"), array("q"), array("d")))
    column[0].append(_DOUBLE(time)[0])
    column[1].append(0 if varint is None else varint[0] if len(varint) == 1 else _signed(_varint(varint, 0)[0]))
    column[2].append(_FLOAT(value)[0])
    return True


_DOUBLE = struct.Struct("<d").unpack
_FLOAT = struct.Struct("<f").unpack


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _read_event(payload: bytes, columns: dict[bytes, Columns], records: list[tuple[float, int, str]]) -> None:
    """Read any event."""
    # An event is a protocol buffer: 1 wall time (double), 2 step (varint), 5 summary (message).
    time, step, summary = 0.0, 0, b""
    for number, value in _fields(payload):
        if number == 1:
            (time,) = _DOUBLE(value)
        elif number == 2:
            step = _signed(value)
        elif number == 5:
            summary = value
    # A summary holds values (1), each with a tag (1) and a float (2), or a tensor (8).
    for number, value in _fields(summary):
        if number != 1:
            continue
        tag, scalar, tensor = b"", None, None
        for part, content in _fields(value):
            if part == 1:
                tag = content
            elif part == 2:
                (scalar,) = _FLOAT(content)
            elif part == 8:
                tensor = content
        if scalar is None and tensor is not None:
            if tag.decode() == RECORD_TAG:
                records.append((time, step, next(text.decode() for part, text in _fields(tensor) if part == 8)))
                continue
            scalar = _scalar_of(tensor)
        if scalar is None:
            continue
        times, steps, values = columns.setdefault(tag, (array("d"), array("q"), array("d")))
        times.append(time)
        steps.append(step)
        values.append(scalar)


def _scalar_of(tensor: bytes) -> float | None:
    """The number of a tensor of one float, as TensorFlow writes scalars (``float_val``: 5, content: 4); else None."""
    for number, value in _fields(tensor):
        if number == 1 and value != 1:  # dtype, DT_FLOAT
            return None
        if number in (4, 5) and isinstance(value, bytes) and len(value) == 4:
            return _FLOAT(value)[0]
    return None


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by their numbers: integers as such, everything else as bytes."""
    i, end = 0, len(message)
    while i < end:
        key, i = _varint(message, i)
        kind = key & 7
        if kind == 0:
            value, i = _varint(message, i)
            yield key >> 3, value
            continue
        if kind == 2:
            size, i = _varint(message, i)
        else:
            size = 8 if kind == 1 else 4
        yield key >> 3, message[i : i + size]
        i += size


def _varint(message: bytes, i: int) -> tuple[int, int]:
    byte = message[i]
    if byte < 128:
        return byte, i + 1
    value, shift = byte & 127, 7
    while True:
        i += 1
        byte = message[i]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, i + 1
        shift += 7
