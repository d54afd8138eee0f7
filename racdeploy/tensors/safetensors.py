"""Read and write safetensors files without the library, because numpy has no bfloat16.

Source: safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from racdeploy.errors import ArtifactError, ModelError
from racdeploy.files.reading import MAX_BYTES, describe_validation_error, parse_json

BYTE_DTYPE = "U8"
"""dtype tag of tensors that hold packed codes, such as those of MXFP4."""
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", BYTE_DTYPE: "u1"}
"""dtype tag → numpy dtype; bfloat16 is read as bit patterns."""
_MAX_TENSORS = 100_000
_MAX_AXES = 8
_MAX_AXIS_LENGTH = 1 << 40
_COPY_BYTES = 1 << 24  # of a tensor, in memory at a time
Shape = tuple[int, ...]
RowIndices = NDArray[np.int64]


class WritableTensor(Protocol):
    """A tensor that can be written into a file, wherever its values come from."""

    @property
    def dtype(self) -> str:
        """Its dtype tag."""

    @property
    def shape(self) -> Shape:
        """Length of each axis."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield its bytes in order, a piece in memory at a time."""


@dataclass(frozen=True)
class TensorEntry:
    """Location of one tensor: file, absolute byte range, dtype tag and shape."""

    file: Path
    start: int
    stop: int
    dtype: str
    shape: Shape

    @property
    def quant(self) -> str:
        """Number format in the file."""
        return self.dtype.lower()

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its values in the file."""
        return _count_bytes(self.dtype, self.shape)

    def read(self) -> NDArray[Any]:
        """Return the tensor as stored; bfloat16 comes as uint16 bit patterns."""
        values = np.fromfile(self.file, DTYPES[self.dtype], self.size, offset=self.start)
        return values.reshape(self.shape)

    def map(self) -> NDArray[Any]:
        """Return the tensor as stored, which must not be empty; only what is used is read."""
        return np.memmap(
            self.file, DTYPES[self.dtype], mode="r", offset=self.start, shape=self.shape
        )

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield its bytes in order, a piece in memory at a time."""
        with self.file.open("rb") as source:
            source.seek(self.start)
            for start in range(self.start, self.stop, _COPY_BYTES):
                size = min(self.stop - start, _COPY_BYTES)
                piece = source.read(size)
                assert len(piece) == size, f"{self.file} shrank while it was read"
                yield piece


@dataclass(frozen=True)
class PackedEntry(TensorEntry):
    """A matrix that is decoded from its ``parts``, in a number format, when it is read."""

    parts: tuple[TensorEntry, ...]
    packed_quant: str

    @property
    def quant(self) -> str:
        return self.packed_quant

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    def iter_bytes(self) -> Iterator[bytes]:
        yield self.read().tobytes()

    @abstractmethod
    def read_packed(self) -> NDArray[np.uint8]:
        """Return its rows as an exported file has them, packed_OP."""


def read_tensor_entries(file: Path) -> dict[str, TensorEntry]:
    """Parse one safetensors header and check every range against the file."""
    if not file.is_file():
        raise ModelError("missing-shard", f"{file} is missing", remedy="copy or download it again")

    size_bytes = file.stat().st_size
    damaged = ModelError(
        "damaged-safetensors",
        f"{file} is truncated or not a safetensors file",
        remedy="copy or download it again",
    )

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or length > min(size_bytes - 8, MAX_BYTES):
            raise damaged
        try:
            header = parse_json(stream.read(length).decode("utf-8"), str(file), strict=True)
        except (ArtifactError, UnicodeDecodeError) as error:
            raise damaged from error

    if not isinstance(header, dict) or not _is_metadata(header.pop("__metadata__", None)):
        raise damaged
    if len(header) > _MAX_TENSORS:
        damaged.message = f"{file} has {len(header):,} tensors; at most {_MAX_TENSORS:,} are read"
        raise damaged

    data_start = 8 + length
    entries = {}
    for name, value in header.items():
        entries[name] = _read_entry(file, name, value, data_start=data_start, size_bytes=size_bytes)
    _check_ranges(file, entries, data_start, size_bytes)
    return entries


def to_float32(raw: NDArray[Any]) -> NDArray[np.float32]:
    """Return stored values as float32, without a copy if they are float32 already."""
    if raw.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def write_header(target: BinaryIO, described: Mapping[str, tuple[str, Shape]]) -> int:
    """Write the header of a safetensors file; the caller writes the tensors' bytes behind it.

    Args:
        described: name → dtype tag and shape, in file order.

    Returns:
        Number of bytes that have to follow.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in described.items():
        stop = start + _count_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    target.write(len(text).to_bytes(8, "little"))
    target.write(text)
    return start


def write_entries(
    entries: Mapping[str, WritableTensor],
    file: Path,
    rows: Mapping[str, RowIndices] | None = None,
    *,
    zero_filled: bool = False,
) -> None:
    """Write tensors of other files into a new file, a piece of each in memory at a time.

    Args:
        entries: tensors by their name in the new file, in file order.
        rows: for some tensors the rows to keep, in their new order; other tensors keep all rows.
        zero_filled: write a hole of the right size in place of the values, which then read as
            zeros.
    """
    rows = rows or {}

    described = {}
    for name, entry in entries.items():
        shape = entry.shape
        if name in rows:
            shape = (len(rows[name]), *shape[1:])
        described[name] = (entry.dtype, shape)

    with file.open("wb") as target:
        size_bytes = write_header(target, described)
        if zero_filled:
            target.truncate(target.tell() + size_bytes)
            return

        for name, entry in entries.items():
            if name in rows:
                target.writelines(_read_rows(entry, rows[name]))
            else:
                target.writelines(entry.iter_bytes())


def _count_bytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def _read_rows(entry: WritableTensor, rows: RowIndices) -> Iterator[bytes]:
    assert type(entry) is TensorEntry, "only rows of a contiguous tensor can be picked"
    stored = entry.map()
    row_bytes = (entry.stop - entry.start) // max(1, entry.shape[0])
    rows_per_piece = max(1, _COPY_BYTES // max(1, row_bytes))

    for start in range(0, len(rows), rows_per_piece):
        yield stored[rows[start : start + rows_per_piece]].tobytes()


def _check_ranges(
    file: Path, entries: Mapping[str, TensorEntry], data_start: int, size_bytes: int
) -> None:
    """Refuse overlapping tensors and gaps between them, as the reference library does."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    fault = ""
    end = data_start

    for name, entry in ordered:
        if entry.start != end and not fault:
            problem = "overlaps another one" if entry.start < end else "lies behind a gap"
            fault = f"the tensor {name!r} {problem}"
        end = entry.stop

    if not fault and end != size_bytes:
        fault = f"{size_bytes - end} bytes belong to no tensor"
    if fault:
        raise ModelError(
            "damaged-safetensors", f"{file} is damaged: {fault}", remedy="copy or download it again"
        )


class _Described(BaseModel):
    """A tensor in a header."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, le=_MAX_AXIS_LENGTH)]] = Field(max_length=_MAX_AXES)
    data_offsets: list[int] = Field(min_length=2, max_length=2)


def _read_entry(
    file: Path, name: str, value: object, data_start: int, size_bytes: int
) -> TensorEntry:
    try:
        described = _Described.model_validate(value, strict=True)
    except ValidationError as error:
        raise ModelError(
            "damaged-safetensors",
            f"{file}: the header entry of {name!r} is damaged: {describe_validation_error(error)}",
        ) from error

    tag = described.dtype
    shape = described.shape
    offsets = described.data_offsets
    if tag not in DTYPES:
        raise ModelError(
            "unsupported-dtype",
            f"{file}: tensor {name!r} has dtype {tag[:20]!r}, supported are {', '.join(DTYPES)}",
            remedy="start from the unquantized checkpoint",
        )

    start, stop = data_start + offsets[0], data_start + offsets[1]
    is_inside = data_start <= start and stop <= size_bytes
    if not is_inside or stop - start != _count_bytes(tag, shape):
        raise ModelError(
            "damaged-safetensors",
            f"{file} is truncated or damaged: tensor {name!r} needs bytes {start} to {stop} of"
            f" {size_bytes}",
            remedy="copy or download it again",
        )

    return TensorEntry(file, start=start, stop=stop, dtype=tag, shape=tuple(shape))


def _is_metadata(value: object) -> bool:
    if not isinstance(value, dict):
        return value is None
    return all(isinstance(text, str) for text in value.values())
