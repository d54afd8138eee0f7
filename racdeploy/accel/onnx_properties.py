"""The metadata properties of an ONNX file, read without its weights.

A device has no onnx package. Source: onnx.proto3; protobuf's wire format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from racdeploy.errors import ArtifactError

_PROPERTIES = 14  # field number in ModelProto
_MOST_PROPERTY_BYTES = 64_000_000
_NUMBER, _BYTES = 0, 2  # wire types


def read_properties(file: Path) -> dict[str, str]:
    """Return the metadata properties of a graph, without reading the rest of it.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with file.open("rb") as stream:
            payloads = list(_read_fields(stream, file.stat().st_size, _PROPERTIES))
        return dict(_read_pair(payload) for payload in payloads)
    except (ValueError, OSError) as error:
        raise ArtifactError(
            f"{file} is not a readable ONNX file: {error}", remedy="copy it again"
        ) from error


def _read_fields(stream: BinaryIO, size_bytes: int, wanted: int) -> Iterator[bytes]:
    """Yield the payloads of one field of a message, and pass over the others."""
    while stream.tell() < size_bytes:
        key = _read_varint(stream)
        number = key >> 3
        wire_type = key & 7
        if wire_type == _NUMBER:
            _read_varint(stream)
            continue
        if wire_type != _BYTES:
            raise ValueError(f"a field of wire type {wire_type}")

        length = _read_varint(stream)
        if length > size_bytes - stream.tell():
            raise ValueError(f"a field of {length} bytes ends behind the file")
        if number != wanted:
            stream.seek(length, io.SEEK_CUR)
        elif length > _MOST_PROPERTY_BYTES:
            raise ValueError(f"a property of {length} bytes")
        else:
            yield stream.read(length)


def _read_pair(payload: bytes) -> tuple[str, str]:
    """Return the strings of fields 1 and 2."""
    strings = []
    for number in (1, 2):
        parts = _read_fields(io.BytesIO(payload), len(payload), number)
        strings.append(b"".join(parts).decode())

    key, value = strings
    return key, value


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
