"""Bitmask: a bit for each weight, and the codes that are not zero; four-bit codes go in words.

Format: docs/reference/racgguf.md. Unpacking restores the same bytes for any input: negative zeros,
scales of blocks of zeros and codes of any value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.packing import racgguf
from racdeploy.packing.block_layouts import BLOCK_LAYOUTS, CHUNK_WEIGHTS, Bytes
from racdeploy.packing.buckets import TABLE_BYTES, BucketTable
from racdeploy.packing.chunks import (
    MIN_WORD_WEIGHTS,
    count_codes,
    count_map_bytes,
    pack_chunk,
    unpack_chunk,
)
from racdeploy.packing.masks import reason_against_mask
from racdeploy.packing.racgguf import ByteReader, PackedTensor, StoredTensor, iter_tensor_bytes
from racdeploy.tensors.gguf_header import GgufHeader, TensorInfo

FORMATS = ("gguf",)
REQUIRES_ZEROS = True
KEEPS_PLAIN_FILE = False
SUFFIX = racgguf.SUFFIX
_NAME = __name__.rpartition(".")[2]
_K_QUANTS = range(10, 16)


def reason_for_plain(quant: str, zeros_fraction: float) -> str:
    """Return why a tensor of this quant is better stored plain, or an empty string."""
    return _reason_for_plain(quants.load_ggml(quant).type_id, zeros_fraction)


def usage(path: str) -> list[str]:
    """Return how other programs get the plain file."""
    return [f"Unpack it for other programs: `racdeploy unpack {path}`", ""]


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``; see :func:`racdeploy.packing.racgguf.pack`."""
    return racgguf.pack(plain, out, _NAME, BitmaskTensorPacker)


class BitmaskTensorPacker:
    """Packer of the tensors of a file, which counts the codes of all of them first.

    Tensors of one number format with about the same fraction of zeros share a table: unpacking then
    builds it once, and tables of their own would hardly be smaller.
    """

    def __init__(self, header: GgufHeader, source: BinaryIO) -> None:
        self._source = source

        self._tallies: dict[str, NDArray[np.int64]] = {}
        self._tables: dict[str, BucketTable] = {}
        same_shape: dict[tuple[int, int], list[str]] = {}
        for tensor in header.tensors:
            layout = BLOCK_LAYOUTS.get(tensor.ggml_type)
            if layout is None:
                continue

            tallies = [count_codes(layout, chunk) for chunk in self._chunks(tensor)]
            self._tallies[tensor.name] = tallied = np.sum(tallies, axis=0)
            # Share tables by format and zeros, rounded to a tenth.
            if layout.uses_words:
                kind = tensor.ggml_type, round(10 * _share_zeros(tallied))
                same_shape.setdefault(kind, []).append(tensor.name)

        for names in same_shape.values():
            together = np.sum([self._tallies[name] for name in names], axis=0)
            self._tables |= dict.fromkeys(names, BucketTable.from_counts(together))

    def reason_for_plain(self, tensor: TensorInfo) -> str:
        tallied = self._tallies.get(tensor.name)
        if tallied is None:
            return _reason_for_plain(tensor.ggml_type, 0.0)

        weights = int(tallied.sum())
        if BLOCK_LAYOUTS[tensor.ggml_type].uses_words and weights < MIN_WORD_WEIGHTS:
            return f"its {weights} weights do not pay for a table"

        return _reason_for_plain(tensor.ggml_type, _share_zeros(tallied))

    def pack(self, tensor: TensorInfo) -> Iterator[bytes]:
        """Yield the table, if the number format has one, and the stored bytes of all chunks."""
        table = self._tables.get(tensor.name)
        if table:
            yield table.costs + table.bucket_bits
        for index, chunk in enumerate(self._chunks(tensor)):
            yield pack_chunk(BLOCK_LAYOUTS[tensor.ggml_type], chunk, index, table)

    def _chunks(self, tensor: TensorInfo) -> Iterator[Bytes]:
        layout = BLOCK_LAYOUTS[tensor.ggml_type]
        chunk_bytes = CHUNK_WEIGHTS // layout.block_weights * layout.block_bytes
        return iter_tensor_bytes(tensor, self._source, chunk_bytes)


def find_damage(tensor: StoredTensor) -> str:
    """Return why a stored tensor cannot be a packed one, or an empty string.

    It bounds the work of unpacking by the size of the file: a tensor takes at least its mask.
    """
    layout = BLOCK_LAYOUTS.get(tensor.ggml_type)
    if layout is None:
        return f"is packed and of type {tensor.ggml_type}, which cannot be packed"

    weights = layout.count_weights(tensor.plain_bytes)
    min_bytes = count_map_bytes(layout, weights)
    if tensor.stored_bytes < min_bytes:
        return f"is stored in {tensor.stored_bytes} bytes, less than the {min_bytes} of its mask"
    if layout.uses_words and weights < MIN_WORD_WEIGHTS:
        return f"is packed and has {weights} weights, fewer than {MIN_WORD_WEIGHTS}"

    return ""


def unpack_tensor(tensor: StoredTensor, source: ByteReader) -> Iterator[Bytes]:
    """Yield the bytes of a tensor, whole blocks at a time."""
    layout = BLOCK_LAYOUTS[tensor.ggml_type]
    weights = layout.count_weights(tensor.plain_bytes)
    table = (
        BucketTable.from_bytes(source.read(TABLE_BYTES).tobytes()) if layout.uses_words else None
    )
    while weights:
        chunk = unpack_chunk(layout, source.read, table, min(weights, CHUNK_WEIGHTS))
        weights -= layout.count_weights(chunk.size)
        yield chunk


def _share_zeros(tallied: NDArray[np.int64]) -> float:
    return float(tallied[0] / tallied.sum())


def _reason_for_plain(ggml_type: int, zeros_fraction: float) -> str:
    layout = BLOCK_LAYOUTS.get(ggml_type)
    if layout is not None:
        bits = 8 * layout.block_bytes / layout.block_weights
        return reason_against_mask(zeros_fraction, sum(layout.plane_bits), bits)

    packed = ", ".join(layout.name for layout in BLOCK_LAYOUTS.values())
    reason = f"bitmask knows the fields of {packed}, not of ggml type {ggml_type}"
    if ggml_type in _K_QUANTS:
        reason += ": its codes are spread over several fields of a block"
    return reason
