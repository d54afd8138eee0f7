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
_VARINT, _BYTES = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type
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
    with open_regular(graph) as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return set(_iter_locations(buffer))
        except (ValueError, IndexError) as error:  # also that of mmap for an empty file
            raise ArtifactError(
                "damaged-onnx",
                f"{graph} is not a readable ONNX file: {error}",
                remedy="copy or export it again",
            ) from error


def _iter_locations(buffer: mmap.mmap) -> Iterator[str]:
    pending = [("model", 0, len(buffer))]
    fields = 0
    while pending:
        message, start, stop = pending.pop()
        texts = {}
        for number, first, last in _iter_fields(buffer, start, stop):
            fields += 1
            if fields > _MAX_FIELDS:
                raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")
            if message == "entry":
                texts[number] = buffer[first:last]
            elif inner := MESSAGES[message].get(number):
                pending.append((inner, first, last))

        # The last key and the last value count.
        if texts.get(1) == b"location":
            yield texts.get(2, b"").decode("utf-8")


def _iter_fields(buffer: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and stop of each field of a message that has a length."""
    while start < stop:
        tag, start = _read_varint(buffer, start)
        kind = tag & 7
        size = _FIXED_BYTES.get(kind, stop)
        if kind in (_VARINT, _BYTES):
            value, start = _read_varint(buffer, start)
            size = value if kind == _BYTES else 0

        # Other readers cut a tag to 32 bits.
        if not 8 <= tag < 1 << 32 or size > stop - start:
            raise ValueError(f"a field at byte {start} is damaged")
        if kind == _BYTES:
            yield tag >> 3, start, start + size
        start += size


def _read_varint(buffer: mmap.mmap, start: int) -> tuple[int, int]:
    """Return a number of at most ten bytes, and the position behind it."""
    value = shift = 0
    while buffer[start] > 127 and shift < 63:
        value |= (buffer[start] & 127) << shift
        shift += 7
        start += 1
    return value | buffer[start] << shift, start + 1
