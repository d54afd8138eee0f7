"""Pack a finished GGUF file into a .racgguf container, tensor by tensor.

The finished container is unpacked as a whole before it gets its final name.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.partials import partial_folder
from racdeploy.files.writing import disk_errors, file_sha256
from racdeploy.packing.block_layouts import Bytes
from racdeploy.packing.racgguf import container
from racdeploy.tensors.gguf_header import (
    FIXED_HEADER_BYTES,
    GgufHeader,
    TensorInfo,
    align_up,
    read_header,
)

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as it was stored; ``reason`` says why it is plain, or is empty if it is packed."""

    name: str
    plain_bytes: int
    stored_bytes: int
    reason: str


class TensorPacker(Protocol):
    """Contract of a packing's class that packs the tensors of one file, which it may read first.

    ``reason_for_plain`` returns why a tensor is better stored plain, or an empty string; ``pack``
    yields its packed bytes.
    """

    def __init__(self, header: GgufHeader, source: BinaryIO) -> None: ...

    def reason_for_plain(self, tensor: TensorInfo) -> str: ...

    def pack(self, tensor: TensorInfo) -> Iterator[bytes]: ...


def pack(
    plain: Path, out: Path, packing: str, packer: type[TensorPacker]
) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``, byte for byte; replace an older file.

    Args:
        packing: name of the plugin that unpacks it.
        packer: class that packs the tensors.

    Raises:
        ArtifactError: ``plain`` is damaged, or has bytes other than zeros between its tensors.
        UsageError: ``out`` has another suffix, or its folder is missing.
    """
    if out.suffix != container.SUFFIX or not out.parent.is_dir():
        raise UsageError(
            "wrong-file-name",
            f"{out} is not a {container.SUFFIX} file in an existing folder",
            remedy=f"name it *{container.SUFFIX}",
        )

    header = read_header(plain, (3,))
    if any(key.startswith("racgguf.") for key in header.metadata):
        raise ArtifactError("already-packed", f"{plain} is a container already")

    with disk_errors(out), partial_folder(out) as scratch:
        data = scratch / "data"
        packed = scratch / out.name

        # The header has the packed sizes, so the data is written first.
        with plain.open("rb") as source, data.open("wb") as sink:
            tensor_packer = packer(header, source)
            rows = []
            for tensor in header.tensors:
                start = align_up(sink.tell(), header.alignment)
                sink.write(bytes(start - sink.tell()))
                rows.append(_store(tensor, tensor_packer, source, sink))

        with data.open("rb") as chunks, packed.open("wb") as sink:
            sink.write(_make_header(plain, header, packing, rows))
            shutil.copyfileobj(chunks, sink, _COPY_BYTES)
            sink.write(bytes(align_up(sink.tell(), header.alignment) - sink.tell()))
            sink.flush()
            os.fsync(sink.fileno())

        _check(plain, packed)
        packed.replace(out)

    return tuple(rows)


def iter_tensor_bytes(tensor: TensorInfo, source: BinaryIO, piece_bytes: int) -> Iterator[Bytes]:
    """Yield the bytes of a tensor of a plain file, at most ``piece_bytes`` at a time."""
    source.seek(tensor.position)
    remaining = tensor.size_bytes
    while remaining:
        piece = np.fromfile(source, dtype=np.uint8, count=min(remaining, piece_bytes))
        if not piece.size:
            raise ArtifactError(
                "file-became-shorter",
                f"{source.name} became shorter while it was read",
                remedy="copy or export it again",
            )

        remaining -= piece.size
        yield piece


def _store(
    tensor: TensorInfo, packer: TensorPacker, source: BinaryIO, sink: BinaryIO
) -> PackedTensor:
    """Write one tensor, packed unless a reason is against it."""
    start = sink.tell()
    reason = packer.reason_for_plain(tensor)
    if not reason:
        sink.writelines(packer.pack(tensor))
        if sink.tell() - start >= tensor.size_bytes:
            reason = "its packed form is not smaller"

    # Overwrite the packed form, if any.
    if reason:
        sink.seek(start)
        sink.truncate()
        pieces = iter_tensor_bytes(tensor, source, _COPY_BYTES)
        sink.writelines(piece.data for piece in pieces)

    return PackedTensor(tensor.name, tensor.size_bytes, sink.tell() - start, reason)


def _make_header(plain: Path, header: GgufHeader, packing: str, rows: list[PackedTensor]) -> bytes:
    """Return the bytes in front of the tensors: the plain file's metadata, five keys, infos."""
    recorded = []
    infos = []
    for tensor, row in zip(header.tensors, rows, strict=True):
        recorded += [tensor.ggml_type, len(tensor.dimensions), *tensor.dimensions]
        shape = tensor.dimensions
        ggml_type = tensor.ggml_type
        if not row.reason:
            shape = (row.stored_bytes,)
            ggml_type = container.PACKED_TYPE

        infos.append((tensor.name, shape, ggml_type, row.stored_bytes))

    keys = len(header.metadata) + len(container.KEYS)

    # Metadata is copied as bytes, not rewritten, so that unpacking restores it exactly.
    with plain.open("rb") as source:
        source.seek(FIXED_HEADER_BYTES)
        metadata = source.read(header.key_positions[""] - FIXED_HEADER_BYTES)

    # The container's own metadata; the number in front of a value is its GGUF type.
    values = (
        struct.pack("<II", 4, container.VERSION),
        struct.pack("<I", 8) + container.pack_string(packing),
        struct.pack("<IQ", 10, header.size_bytes),
        struct.pack("<I", 8) + container.pack_string(file_sha256(plain)),
        struct.pack(f"<IIQ{len(recorded)}Q", 9, 10, len(recorded), *recorded),
    )

    pairs = zip(container.KEYS, values, strict=True)
    metadata += b"".join(container.pack_string(key) + value for key, value in pairs)

    made = (
        container.pack_counts(len(rows), keys)
        + metadata
        + container.pack_tensor_infos(infos, header.alignment)
    )
    return made.ljust(align_up(len(made), header.alignment), b"\0")


def _check(plain: Path, packed: Path) -> None:
    try:
        container.Container.open(packed).check_sha256()
    except ArtifactError as error:
        raise ArtifactError(
            "cannot-be-packed",
            f"{plain} cannot be packed: it would unpack to other bytes, "
            "as where bytes between its tensors or behind the last one are not zero",
            remedy="write it again with racdeploy export or llama.cpp",
        ) from error
