"""The metadata properties of an ONNX file, read without its weights.

A device has no onnx package. Source: onnx.proto3; protobuf's wire format.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from racdeploy.errors import ArtifactError

_PROPERTIES = 14  # field number in ModelProto
_KEY, _VALUE = 1, 2  # in StringStringEntryProto
_MAX_PROPERTY_BYTES = 64_000_000
_NUMBER, _BYTES = 0, 2  # wire types


def read_properties(file: Path) -> dict[str, str]:
    """Return the metadata properties of a graph.

    Raises:
        ArtifactError: the file is damaged.
    """
    properties = {}
    try:
        with file.open("rb") as stream:
            for _, payload in _read_fields(stream, file.stat().st_size, (_PROPERTIES,)):
                pair = dict(_read_fields(io.BytesIO(payload), len(payload), (_KEY, _VALUE)))
                properties[pair.get(_KEY, b"").decode()] = pair.get(_VALUE, b"").decode()
    except (ValueError, OSError) as error:
        raise ArtifactError(
            "damaged-onnx", f"{file} is not a readable ONNX file: {error}", remedy="copy it again"
        ) from error

    return properties


def _read_fields(
    stream: BinaryIO, size_bytes: int, wanted: Collection[int]
) -> Iterator[tuple[int, bytes]]:
    """Yield numbers and payloads of some fields of a message, and pass over the others."""
    while stream.tell() < size_bytes:
        number, wire_type = divmod(_read_varint(stream), 8)
        if wire_type == _NUMBER:
            _read_varint(stream)
            continue
        if wire_type != _BYTES:
            raise ValueError(f"a field of wire type {wire_type}")

        length = _read_varint(stream)
        if length > size_bytes - stream.tell():
            raise ValueError(f"a field of {length} bytes ends behind the file")
        if number not in wanted:
            stream.seek(length, io.SEEK_CUR)
        elif length > _MAX_PROPERTY_BYTES:
            raise ValueError(f"a property of {length} bytes")
        else:
            yield number, stream.read(length)


def _read_varint(stream: BinaryIO) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends within a number")

        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value

    raise ValueError("a number of more than 64 bits")
