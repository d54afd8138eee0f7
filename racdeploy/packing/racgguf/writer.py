"""Pack a finished GGUF file into a .racgguf container, tensor by tensor.

Every chunk is unpacked again as it is packed, and a tensor that would come back as other bytes stays plain; the
finished container is unpacked as a whole before it takes its name.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.packing.buckets import Table
from racdeploy.packing.chunks import (
    CHUNK_WEIGHTS,
    LEAST_WORD_WEIGHTS,
    Taker,
    fit_table,
    pack_chunk,
    refusal,
    tally,
    unpack_chunk,
)
from racdeploy.packing.layouts import LAYOUTS, Layout
from racdeploy.packing.racgguf.container import (
    KEYS,
    PACKED_TYPE,
    SUFFIX,
    VERSION,
    Container,
    tensor_infos,
)
from racdeploy.storage.files import disk_errors, file_sha256
from racdeploy.storage.gguf_header import FIXED_BYTES, Header, TensorInfo, padded, read_header

Progress = Callable[[int, int], None]
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PackedTensor:
    """How one tensor is stored.

    Args:
        name: in the file.
        plain_bytes: size in the plain file.
        stored_bytes: size in the container.
        reason: why it is stored plain; empty where it is packed.
    """

    name: str
    plain_bytes: int
    stored_bytes: int
    reason: str


def pack(plain: Path, out: Path, progress: Progress | None = None) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``, byte for byte.

    Args:
        plain: a GGUF file.
        out: the file to write, ``*.racgguf``; replaced if it exists.
        progress: called with the plain bytes packed so far and all of them.

    Raises:
        ArtifactError: ``plain`` is damaged, or is laid out as no writer known here does it.
        UsageError: ``out`` has another suffix, or its folder is missing.
        EnvironmentFailure: the disk is full or not writable.
    """
    if out.suffix != SUFFIX or not out.parent.is_dir():
        raise UsageError(
            f"{out} is not a {SUFFIX} file in a folder that is there", remedy=f"name it *{SUFFIX}"
        )
    header = read_header(plain, (3,))
    if any(key.startswith("racgguf.") for key in header.values):
        raise ArtifactError(f"{plain} is a container already")
    data, partial = (out.with_name(f".{out.name}.{kind}") for kind in ("data", "partial"))
    with disk_errors(out):
        try:
            with plain.open("rb") as source, data.open("wb") as sink:
                rows = _store_all(header, source, sink, progress)
            _assemble(plain, header, rows, data, partial)
            _check(plain, partial)
            partial.replace(out)
        finally:
            data.unlink(missing_ok=True)
            partial.unlink(missing_ok=True)
    return tuple(rows)


def _store_all(
    header: Header, source: BinaryIO, sink: BinaryIO, progress: Progress | None
) -> list[PackedTensor]:
    tallies = _tallies(header, source)
    tables, rows = _tables(header, tallies), []
    for tensor in header.tensors:
        reason, table = _reason(tensor, tallies.get(tensor.name)), tables.get(tensor.name)
        rows.append(_store(tensor, reason, table, source, sink, header.alignment))
        if progress:
            progress(tensor.position + tensor.size_bytes, header.size_bytes)
    return rows


def _tallies(header: Header, source: BinaryIO) -> dict[str, NDArray[np.int64]]:
    """Return how often each code comes up, for every tensor whose number format can be packed."""
    return {
        tensor.name: np.sum(
            [tally(layout, piece) for piece in _pieces(tensor, source, _chunk_bytes(layout))],
            axis=0,
        )
        for tensor in header.tensors
        if (layout := LAYOUTS.get(tensor.ggml_type))
    }


def _tables(header: Header, tallies: dict[str, NDArray[np.int64]]) -> dict[str, Table | None]:
    """Return the table of each tensor; those of one number format with about as many zeros share it.

    A shared table is built once to unpack them, and a tensor of its own has hardly a better one.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for tensor in header.tensors:
        if tensor.name in tallies:
            kinds.setdefault(
                (tensor.ggml_type, round(10 * _zeros(tallies[tensor.name]))), []
            ).append(tensor.name)
    tables: dict[str, Table | None] = {}
    for (ggml_type, _), names in kinds.items():
        table = fit_table(LAYOUTS[ggml_type], np.sum([tallies[name] for name in names], axis=0))
        tables |= dict.fromkeys(names, table)
    return tables


def _zeros(tallied: NDArray[np.int64]) -> float:
    return float(tallied[0] / tallied.sum())


def _store(
    tensor: TensorInfo,
    reason: str,
    table: Table | None,
    source: BinaryIO,
    sink: BinaryIO,
    alignment: int,
) -> PackedTensor:
    """Write one tensor at the next aligned place, packed where no reason is against it and it pays."""
    sink.write(bytes(padded(sink.tell(), alignment) - sink.tell()))
    start = sink.tell()
    if not reason and not _pack_tensor(tensor, table, source, sink):
        reason = "its packed form would unpack to other bytes"
    stored_bytes = sink.tell() - start
    if not reason and stored_bytes >= tensor.size_bytes:
        reason = "its packed form is not smaller"
    if reason:
        sink.seek(start)
        sink.truncate()
        for piece in _pieces(tensor, source, _COPY_BYTES):
            sink.write(piece.data)
    return PackedTensor(tensor.name, tensor.size_bytes, sink.tell() - start, reason)


def _reason(tensor: TensorInfo, tallied: NDArray[np.int64] | None) -> str:
    if tallied is None:
        return refusal(tensor.ggml_type, 0.0)
    weights = int(tallied.sum())
    if LAYOUTS[tensor.ggml_type].in_words and weights < LEAST_WORD_WEIGHTS:
        return f"its {weights} weights do not pay for a table"
    return refusal(tensor.ggml_type, _zeros(tallied))


def _pack_tensor(tensor: TensorInfo, table: Table | None, source: BinaryIO, sink: BinaryIO) -> bool:
    layout = LAYOUTS[tensor.ggml_type]
    sink.write(table.stored if table else b"")
    for index, chunk in enumerate(_pieces(tensor, source, _chunk_bytes(layout))):
        record = np.frombuffer(pack_chunk(layout, chunk, index, table), dtype=np.uint8)
        if not np.array_equal(unpack_chunk(layout, Taker(record), table), chunk):
            return False
        sink.write(record.data)
    return True


def _chunk_bytes(layout: Layout) -> int:
    return CHUNK_WEIGHTS // layout.block_weights * layout.block_bytes


def _pieces(tensor: TensorInfo, source: BinaryIO, piece_bytes: int) -> Iterator[NDArray[np.uint8]]:
    source.seek(tensor.position)
    left = tensor.size_bytes
    while left:
        piece = np.fromfile(source, dtype=np.uint8, count=min(left, piece_bytes))
        if not piece.size:
            raise ArtifactError(
                "the file became shorter while it was read", remedy="export it again"
            )
        left -= piece.size
        yield piece


def _assemble(
    plain: Path, header: Header, rows: list[PackedTensor], data: Path, partial: Path
) -> None:
    """Write the container's header and, behind it, its tensors."""
    recorded, infos = [], []
    for tensor, row in zip(header.tensors, rows, strict=True):
        recorded += [tensor.ggml_type, len(tensor.dimensions), *tensor.dimensions]
        kept = tensor.dimensions, tensor.ggml_type
        shape, ggml_type = kept if row.reason else ((row.stored_bytes,), PACKED_TYPE)
        infos.append((tensor.name, shape, ggml_type, row.stored_bytes))
    own = [
        (4, struct.pack("<I", VERSION)),
        (8, _text("bitmask")),
        (10, struct.pack("<Q", header.size_bytes)),
        (8, _text(file_sha256(plain))),
        (9, struct.pack(f"<IQ{len(recorded)}Q", 10, len(recorded), *recorded)),
    ]
    with plain.open("rb") as source, partial.open("wb") as sink:
        source.seek(FIXED_BYTES)
        sink.write(struct.pack("<4sIQQ", b"GGUF", 3, len(rows), len(header.values) + len(KEYS)))
        sink.write(source.read(header.starts[""] - FIXED_BYTES))
        for key, (kind, value) in zip(KEYS, own, strict=True):
            sink.write(_text(key) + struct.pack("<I", kind) + value)
        sink.write(tensor_infos(infos, header.alignment))
        sink.write(bytes(padded(sink.tell(), header.alignment) - sink.tell()))
        with data.open("rb") as packed:
            shutil.copyfileobj(packed, sink, _COPY_BYTES)
        sink.write(bytes(padded(sink.tell(), header.alignment) - sink.tell()))
        sink.flush()
        os.fsync(sink.fileno())


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _check(plain: Path, partial: Path) -> None:
    try:
        Container.open(partial).check_sha256()
    except ArtifactError as error:
        raise ArtifactError(
            f"{plain} cannot be packed: bytes between its tensors or behind the last one are not zero",
            remedy="write it again with racdeploy export or llama.cpp",
        ) from error
