"""Read and check the header of a GGUF file, as strictly as ggml does.

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
from racdeploy.tensors.ggml_types import TYPES_BY_ID

MetadataValue = str | int | float | bool | NDArray[np.uint64] | None
Dimensions = tuple[int, ...]
_Infos = dict[str, tuple[Dimensions, int, int]]  # dimensions, type and offset by name
FIXED_HEADER_BYTES = 24
_SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY, _U64 = 8, 9, 10
# Memory for all that is read: a vocabulary of 262,144 tokens takes 15 MB of it.
_MAX_BYTES = 50_000_000
_ENTRY_BYTES, _STRING_BYTES = 640, 16  # for a key or a tensor; for a string of an array
_MAX_DIMENSIONS = 4
_MAX_WEIGHTS = 1 << 62
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Args:
        dimensions: row length first.
        size_bytes: without padding.
        position: of its first byte in the file.
    """

    name: str
    dimensions: Dimensions
    ggml_type: int
    size_bytes: int
    position: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file, with its tensors in file order.

    Args:
        metadata: by key; an array of u64 is kept, other arrays are None.
        key_positions: position of each key in the file; under the empty key, the end of the last.
        data_start: position of the first tensor.
    """

    metadata: dict[str, MetadataValue]
    key_positions: dict[str, int]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    size_bytes: int


def align_up(size_bytes: int, alignment: int) -> int:
    """Return a size rounded up to a multiple of the alignment."""
    return -(-size_bytes // alignment) * alignment


def count_tensor_bytes(dimensions: Dimensions, ggml_type: int) -> int:
    """Return the bytes of a tensor, or raise an ArtifactError for an impossible type or shape."""
    known = TYPES_BY_ID.get(ggml_type)
    if known is None:
        raise ArtifactError("damaged-gguf", f"tensor type {ggml_type} is unknown")

    weights = math.prod(dimensions)
    if (
        not 1 <= len(dimensions) <= _MAX_DIMENSIONS
        or not 0 < weights < _MAX_WEIGHTS
        or dimensions[0] % known.block_weights
    ):
        raise ArtifactError(
            "damaged-gguf",
            f"a tensor of type {ggml_type} cannot have the dimensions {list(dimensions)[:8]}",
        )

    return weights // known.block_weights * known.block_bytes


def read_header(path: Path, versions: tuple[int, ...] = (2, 3)) -> GgufHeader:
    """Read the header of a GGUF file.

    Args:
        versions: format versions to accept; the header is the same in 2 and 3.

    Raises:
        ArtifactError: the header is damaged, or its tensors do not lie in the file in order.
    """
    if not path.is_file():
        raise ArtifactError(
            "no-gguf-file", f"{path} is not a file", remedy="give a .gguf or .racgguf file"
        )

    size_bytes = path.stat().st_size
    try:
        if size_bytes < FIXED_HEADER_BYTES:
            raise ArtifactError("damaged-gguf", f"{size_bytes} bytes are too few for a GGUF file")
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
    position: int = 0
    free_bytes: int = _MAX_BYTES

    def header(self) -> GgufHeader:
        magic = self._take(4)
        version = self._number("I")

        if magic != b"GGUF":
            raise ArtifactError("damaged-gguf", "it does not begin with GGUF")
        if version not in self.versions:
            readable = "version 3" if self.versions == (3,) else "version 2 or 3"
            order = " and big-endian" if version in (2 << 24, 3 << 24) else ""
            raise ArtifactError(
                "damaged-gguf",
                f"it is of version {version:#x}{order}; only little-endian {readable} can be read",
            )

        tensors = self._number("Q")
        keys = self._number("Q")
        self._spend((tensors + keys) * _ENTRY_BYTES)

        values, starts = self._metadata(keys)
        alignment = values.get("general.alignment", 32)
        if (
            type(alignment) is not int
            or not 0 < alignment <= _MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise ArtifactError("damaged-gguf", f"the alignment {alignment!r} is no power of two")

        infos = self._infos(tensors)
        data_start = align_up(self.position, alignment)
        located = self._locate_tensors(infos, data_start, alignment)
        return GgufHeader(
            metadata=values,
            key_positions=starts,
            tensors=located,
            alignment=alignment,
            data_start=data_start,
            size_bytes=self.size_bytes,
        )

    def _metadata(self, count: int) -> tuple[dict[str, MetadataValue], dict[str, int]]:
        """Return the values by key, and the position of each key; that of "" is the end."""
        values: dict[str, MetadataValue] = {}
        starts = {}
        for _ in range(count):
            start = self.position
            key = self._text()
            if key in values or not key:
                raise ArtifactError(
                    "damaged-gguf", f"the key {key[:80]!r} is there twice, or empty"
                )

            starts[key] = start
            values[key] = self._value(self._number("I"))

        starts[""] = self.position
        return values, starts

    def _infos(self, count: int) -> _Infos:
        infos = {}
        for _ in range(count):
            name = self._text()
            dimensions = self._number("I")
            if name in infos or not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise ArtifactError(
                    "damaged-gguf",
                    f"the tensor {name[:80]!r} is there twice, or has {dimensions} dimensions",
                )

            shape = tuple(self._number("Q") for _ in range(dimensions))
            infos[name] = shape, self._number("I"), self._number("Q")

        return infos

    def _locate_tensors(
        self, infos: _Infos, data_start: int, alignment: int
    ) -> tuple[TensorInfo, ...]:
        tensors = []
        expected = 0
        for name, (shape, ggml_type, offset) in infos.items():
            # As ggml: tensors are in order, without gaps other than padding.
            size_bytes = count_tensor_bytes(shape, ggml_type)
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
            expected = align_up(offset + size_bytes, alignment)

        return tuple(tensors)

    def _value(self, kind: int) -> MetadataValue:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        if kind not in _SCALARS:
            raise ArtifactError("damaged-gguf", f"metadata type {kind} is unknown")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> MetadataValue:
        if kind == _STRING:
            self._spend(count * _STRING_BYTES)
            for _ in range(count):
                length = self.buffer[self.position : self.position + 8]
                self._skip(8 + int.from_bytes(length, "little"))
            return None

        if kind not in _SCALARS:
            raise ArtifactError("damaged-gguf", f"an array of metadata type {kind}")
        if kind == _U64:
            return np.frombuffer(self._take(8 * count), dtype="<u8")
        self._skip(count * struct.calcsize(_SCALARS[kind]))
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
        self._spend(count)
        self._skip(count)
        return self.buffer[self.position - count : self.position]

    def _skip(self, count: int) -> None:
        if count > self.size_bytes - self.position:
            raise ArtifactError(
                "damaged-gguf", f"{count} bytes at {self.position} end behind the file"
            )
        self.position += count

    def _spend(self, count: int) -> None:
        """Take memory, of which a hostile header asks for more than any model needs."""
        self.free_bytes -= count
        if self.free_bytes < 0:
            raise ArtifactError(
                "damaged-gguf", f"its header takes more than {_MAX_BYTES:,} bytes of memory"
            )
