"""Names of the files in which an ONNX graph keeps weights, read without the onnx package.

A device has onnxruntime alone. Only the messages that lead to tensors are entered.
Source: ``onnx.proto`` of onnx 1.19; https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from racdeploy.errors import ArtifactError
from racdeploy.files.reading import open_regular

_MAX_FIELDS = 2_000_000
_MAX_FIELD_NUMBER = (1 << 29) - 1
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type
_VARINT, _BYTES = 0, 2
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Messages that lead to external data: the message of each field number."""


def find_data_files(graph: Path) -> set[str]:
    """Return the locations of all external data of a graph, as they are written there.

    Raises:
        ArtifactError: it is no ONNX file, or has too many fields.
    """
    locations = set()
    with open_regular(graph) as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                for entry in _find_entries(buffer):
                    if entry.get(1) == b"location":
                        locations.add(entry.get(2, b"").decode("utf-8"))
        except ValueError as error:  # also that of mmap for an empty file
            raise ArtifactError(
                "damaged-onnx",
                f"{graph} is not a readable ONNX file: {error}",
                remedy="copy or export it again",
            ) from error

    return locations


def _find_entries(buffer: mmap.mmap) -> Iterator[dict[int, bytes]]:
    """Yield key (1) and value (2) of each entry that describes external data."""
    pending = [("model", 0, len(buffer))]
    fields = 0
    while pending:
        message, start, stop = pending.pop()
        entry = {}
        for number, first, last in _iter_fields(buffer, start, stop):
            fields += 1
            if fields > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")
            if message == "entry":
                entry[number] = buffer[first:last]
            elif inner := MESSAGES[message].get(number):
                pending.append((inner, first, last))

        if message == "entry":
            yield entry


def _iter_fields(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and stop of each field of a message that has a length."""
    while start < stop:
        tag, start = _read_varint(buffer, start, stop)
        number, kind = tag >> 3, tag & 7
        size = 0
        if kind == _BYTES:
            size, start = _read_varint(buffer, start, stop)
        elif kind == _VARINT:
            _, start = _read_varint(buffer, start, stop)
        else:
            size = _FIXED_BYTES.get(kind, stop)

        if not 0 < number <= _MAX_FIELD_NUMBER or size > stop - start:
            raise ValueError(f"a field at byte {start} is damaged")
        if kind == _BYTES:
            yield number, start, start + size
        start += size


def _read_varint(buffer: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """Return a number of at most ten bytes, and the position behind it."""
    value = 0
    for index, byte in enumerate(buffer[start : min(stop, start + 10)]):
        value |= (byte & 127) << (7 * index)
        if byte < 128:
            return value, start + index + 1
    raise ValueError(f"a number at byte {start} does not end")
