"""Bitmask: a bit a weight says which codes are not zero and stored; four-bit codes go in words.

The form of the bytes: docs/racgguf.md. What is unpacked is the same bytes for any input: negative
zeros, scales of blocks of zeros and codes of any value.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from racdeploy import quant as quants
from racdeploy.packing import racgguf
from racdeploy.packing.buckets import TABLE_BYTES, Table
from racdeploy.packing.chunks import LEAST_WORD_WEIGHTS, pack_chunk, tally, unpack_chunk
from racdeploy.packing.codes import refuse_mask
from racdeploy.packing.layouts import CHUNK_WEIGHTS, LAYOUTS
from racdeploy.packing.racgguf import PackedTensor, Source, StoredTensor, read_pieces
from racdeploy.tensors.gguf_header import Header, TensorInfo

FORMATS = ("gguf",)
REQUIRES_ZEROS = True
BESIDE_PLAIN = False
SUFFIX = racgguf.SUFFIX
_NAME = __name__.rpartition(".")[2]
_K_QUANTS = range(10, 16)


def fits(quant: str, zeros_fraction: float) -> str:
    """Return why such a tensor is better stored plain, or an empty string."""
    return _refuse(quants.load_ggml(quant).GGML_TYPE, zeros_fraction)


def usage(path: str) -> list[str]:
    """Return how other programs come to the plain file."""
    return [f"Unpack it for other programs: `racdeploy unpack {path}`", ""]


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``; see :func:`racdeploy.packing.racgguf.pack`."""
    return racgguf.pack(plain, out, _NAME, TensorPacker)


class TensorPacker:
    """Packs the tensors of a file, after it has counted the codes of all of them.

    Tensors of one number format with about as many zeros share a table: it is built once to unpack
    them, and its own would hardly be better.
    """

    def __init__(self, header: Header, source: BinaryIO) -> None:
        self._source = source

        self._tallies: dict[str, NDArray[np.int64]] = {}
        self._tables: dict[str, Table] = {}

        alike: dict[tuple[int, int], list[str]] = {}
        for tensor in header.tensors:
            layout = LAYOUTS.get(tensor.ggml_type)
            if layout is None:
                continue

            tallies = [tally(layout, chunk) for chunk in self._chunks(tensor)]
            tallied = np.sum(tallies, axis=0)
            self._tallies[tensor.name] = tallied
            if layout.in_words:
                kind = tensor.ggml_type, round(10 * _share_zeros(tallied))
                alike.setdefault(kind, []).append(tensor.name)

        for names in alike.values():
            together = np.sum([self._tallies[name] for name in names], axis=0)
            self._tables |= dict.fromkeys(names, Table.fit(together))

    def refusal(self, tensor: TensorInfo) -> str:
        tallied = self._tallies.get(tensor.name)
        if tallied is None:
            return _refuse(tensor.ggml_type, 0.0)

        weights = int(tallied.sum())
        if LAYOUTS[tensor.ggml_type].in_words and weights < LEAST_WORD_WEIGHTS:
            return f"its {weights} weights do not pay for a table"

        return _refuse(tensor.ggml_type, _share_zeros(tallied))

    def pack(self, tensor: TensorInfo) -> Iterator[bytes]:
        """Yield the table, where the number format has one, and the records of all chunks."""
        table = self._tables.get(tensor.name)
        if table:
            yield table.stored
        for index, chunk in enumerate(self._chunks(tensor)):
            yield pack_chunk(LAYOUTS[tensor.ggml_type], chunk, index, table)

    def _chunks(self, tensor: TensorInfo) -> Iterator[NDArray[np.uint8]]:
        return read_pieces(tensor, self._source, LAYOUTS[tensor.ggml_type].chunk_bytes)


def refuse_stored(tensor: StoredTensor) -> str:
    """Return why a tensor cannot be a packed one; this bounds the work by the size of the file."""
    layout = LAYOUTS.get(tensor.ggml_type)
    if layout is None:
        return f"is packed and of type {tensor.ggml_type}, which cannot be packed"

    blocks = tensor.plain_bytes // layout.block_bytes
    weights = layout.count_weights(tensor.plain_bytes)
    least_bytes = 5 * blocks if layout.in_words else weights // 8
    if tensor.stored_bytes < least_bytes:
        return f"is stored in {tensor.stored_bytes} bytes, less than the {least_bytes} of its mask"
    if layout.in_words and weights < LEAST_WORD_WEIGHTS:
        return f"is packed and has {weights} weights, fewer than {LEAST_WORD_WEIGHTS}"

    return ""


def unpack_tensor(tensor: StoredTensor, source: Source) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor, whole blocks at a time."""
    layout = LAYOUTS[tensor.ggml_type]
    weights = layout.count_weights(tensor.plain_bytes)
    table = Table.read(source.take(TABLE_BYTES).tobytes()) if layout.in_words else None
    while weights:
        chunk = unpack_chunk(layout, source.take, table, min(weights, CHUNK_WEIGHTS))
        weights -= layout.count_weights(chunk.size)
        yield chunk


def _share_zeros(tallied: NDArray[np.int64]) -> float:
    return float(tallied[0] / tallied.sum())


def _refuse(ggml_type: int, zeros_fraction: float) -> str:
    layout = LAYOUTS.get(ggml_type)
    if layout is not None:
        bits = 8 * layout.block_bytes / layout.block_weights
        return refuse_mask(zeros_fraction, sum(layout.widths), bits)

    packed = ", ".join(layout.name for layout in LAYOUTS.values())
    reason = f"bitmask knows the fields of {packed}, not of ggml type {ggml_type}"
    if ggml_type in _K_QUANTS:
        reason += ": its codes are spread over several fields of a block"
    return reason
