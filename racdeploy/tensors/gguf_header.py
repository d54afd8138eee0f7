"""Read the header of a GGUF file, trust none of it, and be as strict as ggml.

Source: ggml/docs/gguf.md and ``gguf_init_from_file`` in gguf.cpp.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.tensors.ggml_types import GGML_TYPES

Value = str | int | float | bool | NDArray[np.uint64] | None
_Infos = dict[str, tuple[tuple[int, ...], int, int]]  # dimensions, type and offset by name
FIXED_BYTES = 24
GGML_SIZES = {kind.number: (kind.block_weights, kind.block_bytes) for kind in GGML_TYPES.values()}
"""Type id → weights and bytes of a quant block."""
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY, _U64 = 8, 9, 10
_LEAST_KEY_BYTES, _LEAST_INFO_BYTES = 13, 32
_MOST_DIMENSIONS = 4
_LARGEST = 1 << 62
_LARGEST_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dimensions, row length first, and its bytes without padding."""

    name: str
    dimensions: tuple[int, ...]
    ggml_type: int
    size_bytes: int
    position: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file, with its tensors in file order.

    Args:
        values: metadata; an array of u64 as numbers, other arrays as None.
        starts: position of each key, and of the end of the metadata under the empty key.
        data_start: position of the first tensor.
    """

    values: dict[str, Value]
    starts: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    size_bytes: int


def padded(size_bytes: int, alignment: int) -> int:
    """Return a size rounded up to the alignment."""
    return -(-size_bytes // alignment) * alignment


def tensor_bytes(dimensions: tuple[int, ...], ggml_type: int) -> int:
    """Return the size of a tensor; an ArtifactError where it cannot have that type or shape."""
    if ggml_type not in GGML_SIZES:
        raise ArtifactError("damaged-gguf", f"tensor type {ggml_type} is unknown")

    block_weights, block_bytes = GGML_SIZES[ggml_type]
    weights = math.prod(dimensions)
    if (
        not 1 <= len(dimensions) <= _MOST_DIMENSIONS
        or not 0 < weights < _LARGEST
        or dimensions[0] % block_weights
    ):
        raise ArtifactError(
            "damaged-gguf",
            f"a tensor of type {ggml_type} cannot have the dimensions {list(dimensions)[:8]}",
        )

    return weights // block_weights * block_bytes


def read_header(path: Path, versions: tuple[int, ...] = (2, 3)) -> Header:
    """Read the header of a file; ArtifactError unless its tensors lie inside it, in order.

    ``versions`` are those accepted; 2 and 3 differ in nothing that is read here.
    """
    if not path.is_file():
        raise ArtifactError(
            "no-gguf-file", f"{path} is not a file", remedy="give a .gguf or .racgguf file"
        )

    size_bytes = path.stat().st_size
    try:
        if size_bytes < FIXED_BYTES:
            raise ArtifactError("damaged-gguf", f"{size_bytes} bytes are no GGUF file")
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
        ):
            return _Reader(buffer, size_bytes, versions).header()
    except ArtifactError as error:
        raise ArtifactError(
            "damaged-gguf", f"{path} is damaged: {error.message}", remedy="copy or export it again"
        ) from error


@dataclass
class _Reader:
    buffer: mmap.mmap
    size_bytes: int
    versions: tuple[int, ...]
    at: int = 0

    def header(self) -> Header:
        magic = self._take(4)
        version = self._number("I")

        if magic != b"GGUF":
            raise ArtifactError("damaged-gguf", "it does not begin with GGUF")
        if version not in self.versions:
            asked = "version 3" if self.versions == (3,) else "version 2 or 3"
            turned = " and big-endian" if version in (2 << 24, 3 << 24) else ""
            raise ArtifactError(
                "damaged-gguf",
                f"it is of version {version:#x}{turned}; what can be read is little-endian,"
                f" {asked}",
            )

        tensors = self._number("Q")
        keys = self._number("Q")
        if tensors * _LEAST_INFO_BYTES + keys * _LEAST_KEY_BYTES > self.size_bytes:
            raise ArtifactError(
                "damaged-gguf", f"{tensors} tensors and {keys} keys do not fit into it"
            )

        values: dict[str, Value] = {}
        starts: dict[str, int] = {}

        for _ in range(keys):
            start = self.at
            key = self._text()
            if key in values or not key:
                raise ArtifactError(
                    "damaged-gguf", f"the key {key[:80]!r} is there twice, or empty"
                )

            starts[key] = start
            values[key] = self._value(self._number("I"))

        starts[""] = self.at

        alignment = values.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 0 < alignment <= _LARGEST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise ArtifactError("damaged-gguf", f"the alignment {alignment!r} is no power of two")

        infos = self._infos(tensors)
        data_start = padded(self.at, alignment)
        placed = self._place(infos, data_start, alignment)
        return Header(values, starts, placed, alignment, data_start, self.size_bytes)

    def _infos(self, count: int) -> _Infos:
        infos: _Infos = {}
        for _ in range(count):
            name = self._text()
            dimensions = self._number("I")
            if name in infos or not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise ArtifactError(
                    "damaged-gguf",
                    f"the tensor {name[:80]!r} is there twice, or has {dimensions} dimensions",
                )

            shape = tuple(self._number("Q") for _ in range(dimensions))
            infos[name] = shape, self._number("I"), self._number("Q")

        return infos

    def _place(self, infos: _Infos, data_start: int, alignment: int) -> tuple[TensorInfo, ...]:
        tensors = []
        expected = 0

        for name, (shape, ggml_type, offset) in infos.items():
            size_bytes = tensor_bytes(shape, ggml_type)
            stop = data_start + offset + size_bytes
            if offset != expected:
                raise ArtifactError(
                    "damaged-gguf",
                    f"the tensor {name[:80]!r} lies at {offset} and not at {expected}",
                )
            if stop > self.size_bytes:
                raise ArtifactError(
                    "damaged-gguf",
                    f"it is cut off: the tensor {name[:80]!r} ends at byte {stop}, "
                    f"the file at {self.size_bytes}",
                )

            tensors.append(
                TensorInfo(
                    name=name,
                    dimensions=shape,
                    ggml_type=ggml_type,
                    size_bytes=size_bytes,
                    position=data_start + offset,
                )
            )
            expected = padded(offset + size_bytes, alignment)

        return tuple(tensors)

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        if kind not in _SCALARS:
            raise ArtifactError("damaged-gguf", f"metadata type {kind} is unknown")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> Value:
        if kind == _STRING:
            if 8 * count > self.size_bytes - self.at:
                raise ArtifactError("damaged-gguf", f"{count} strings do not fit into it")
            for _ in range(count):
                self._take(self._number("Q"))
            return None

        if kind not in _SCALARS:
            raise ArtifactError("damaged-gguf", f"an array of metadata type {kind}")
        data = self._take(count * struct.calcsize(_SCALARS[kind]))
        if kind == _U64:
            return np.frombuffer(data, dtype="<u8")
        return None

    def _text(self) -> str:
        data = self._take(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArtifactError("damaged-gguf", f"{data[:40]!r} is not UTF-8") from error

    def _number(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float | bool:
        (value,) = struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))
        assert isinstance(value, int | float)
        return value

    def _take(self, count: int) -> bytes:
        if count > self.size_bytes - self.at:
            raise ArtifactError("damaged-gguf", f"{count} bytes at {self.at} end behind the file")
        self.at += count
        return self.buffer[self.at - count : self.at]
