"""As much of ONNX's file form as the proof of the operator needs: the onnx package is not on a device.

Writes graphs of single operators, and reads the properties of a graph without reading its weights.
Source: onnx.proto3; protobuf's wire format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from numpy.typing import NDArray

from racdeploy.errors import ArtifactError

_TYPES = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10}
_MOST_PROPERTY_BYTES = 64_000_000
_MOST_DIMENSIONS = 3
# Field numbers of ModelProto.
_IR_VERSION, _GRAPH, _OPSETS, _PROPERTIES = 1, 7, 8, 14


@dataclass(frozen=True)
class Node:
    """An operator of a domain's version, with whole numbers for attributes."""

    domain: str
    operator: str
    inputs: Sequence[str]
    output: str
    attributes: Mapping[str, int]
    version: int = 1


def model_bytes(
    nodes: Sequence[Node], initializers: Mapping[str, NDArray[Any]], inputs: Mapping[str, int]
) -> bytes:
    """Return a model of those operators; all are outputs.

    Args:
        nodes: in order.
        initializers: by name.
        inputs: the last dimension of each float32 input of three dimensions, by its name.
    """
    parts = [_field(1, _node(node)) for node in nodes]
    parts.append(_field(2, b"graph"))
    parts += [_field(5, _tensor(name, values)) for name, values in initializers.items()]
    parts += [_field(11, _value(name, columns)) for name, columns in inputs.items()]
    parts += [_field(12, _value(node.output, None)) for node in nodes]
    domains = {"": 17} | {node.domain: node.version for node in nodes if node.domain}
    opsets = b"".join(
        _field(_OPSETS, _field(1, name.encode()) + _field(2, v)) for name, v in domains.items()
    )
    return _field(_IR_VERSION, 9) + _field(_GRAPH, b"".join(parts)) + opsets


def read_properties(file: Path) -> dict[str, str]:
    """Return the metadata properties of a graph, without reading the rest of it.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with file.open("rb") as stream:
            pairs = [
                _pair(payload) for payload in _fields(stream, file.stat().st_size, _PROPERTIES)
            ]
        return {key.decode(): value.decode() for key, value in pairs}
    except (ValueError, OSError) as error:
        raise ArtifactError(
            f"{file} is not a readable ONNX file: {error}", remedy="copy it again"
        ) from error


def _node(node: Node) -> bytes:
    attributes = (
        _field(1, name.encode()) + _field(3, value) + _field(20, 2)
        for name, value in node.attributes.items()
    )
    inputs = b"".join(_field(1, name.encode()) for name in node.inputs)
    named = inputs + _field(2, node.output.encode()) + _field(4, node.operator.encode())
    return (
        named
        + b"".join(_field(5, attribute) for attribute in attributes)
        + _field(7, node.domain.encode())
    )


def _tensor(name: str, values: NDArray[Any]) -> bytes:
    dimensions = b"".join(_field(1, extent) for extent in values.shape)
    return (
        dimensions
        + _field(2, _TYPES[values.dtype.name])
        + _field(8, name.encode())
        + _field(9, values.tobytes())
    )


def _value(name: str, columns: int | None) -> bytes:
    shape = b""
    if columns is not None:
        names = [_field(2, f"open{place}".encode()) for place in range(_MOST_DIMENSIONS - 1)]
        shape = _field(2, b"".join(_field(1, extent) for extent in (*names, _field(1, columns))))
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, _TYPES["float32"]) + shape))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(stream: BinaryIO, size_bytes: int, wanted: int) -> Iterator[bytes]:
    """Yield the payloads of one field of a message, and pass over the others."""
    while stream.tell() < size_bytes:
        key = _read_varint(stream)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _read_varint(stream)
        elif kind == 2:
            length = _read_varint(stream)
            if length > size_bytes - stream.tell():
                raise ValueError(f"a field of {length} bytes ends behind the file")
            if number != wanted:
                stream.seek(length, 1)
            elif length > _MOST_PROPERTY_BYTES:
                raise ValueError(f"a property of {length} bytes")
            else:
                yield stream.read(length)
        else:
            raise ValueError(f"a field of wire type {kind}")


def _pair(payload: bytes) -> tuple[bytes, bytes]:
    """Return the strings of fields 1 and 2."""
    values = {
        number: b"".join(_fields(io.BytesIO(payload), len(payload), number)) for number in (1, 2)
    }
    return values[1], values[2]


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
