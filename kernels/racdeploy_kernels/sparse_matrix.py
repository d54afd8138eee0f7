"""Sparse matrices as the kernels read them: a head for each 256 weights of a row, and kept codes.

A head is 8 scales in half precision, if the number format has scales, and a mask of 256 bits, low
bits first. With scales the order of the bits is that of chunks of 8 weights: first weights 0 to 7
of each of the 8 blocks of 32, then weights 8 to 15, and so on. The values of a row follow the order
of the bits: codes of 8 or 16 bits as they are; codes of 4 bits in two halves, chunks 0 and 1 of
every group in the low halves of the bytes and chunks 2 and 3 in the high ones. ``offsets`` are the
starts of the rows in ``values``; behind the last value are ``SLACK_BYTES`` that kernels may read.
Little-endian throughout. Source: ``kernels/sources/sparse_matrix.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

LAYOUT_VERSION = 2  # of sparse_matrix.h, and of the operator's domain in a graph
OPERATOR_DOMAIN = "racdeploy"
ACCEL_KEY = "racdeploy.accel"
"""Metadata property of a graph with such matrices: a list of :class:`PackedWeights`, as JSON."""
SLACK_BYTES = 128
BLOCK = 32
"""Weights that share a scale."""
_GROUP = 256  # weights of a head
_MASK_BYTES = _GROUP // 8
_SCALE_BYTES = 2
_SLAB_WEIGHTS = 4_194_304  # processed at a time, to bound the memory
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class KernelFormat:
    """A number format of the kernels; a packed row has its codes, then its scales."""

    ggml_type: int  # type id of the ggml format with the same codes and scales
    code_bits: int  # of a code
    zero_code: int  # the code of zero, which is left out
    has_scales: bool  # 32 weights share a scale

    @property
    def head_bytes(self) -> int:
        return _MASK_BYTES + self.scale_bytes(_GROUP)

    def scale_bytes(self, I: int) -> int:
        return I // BLOCK * _SCALE_BYTES if self.has_scales else 0

    def code_bytes(self, I: int) -> int:
        return I * self.code_bits // 8

    def row_length(self, row_bytes: int) -> int:
        return row_bytes * BLOCK // (self.code_bytes(BLOCK) + self.scale_bytes(BLOCK))


KERNEL_FORMATS = {
    "f16": KernelFormat(1, 16, 0, False),
    "matmulnbits_8": KernelFormat(8, 8, 128, True),
    "matmulnbits_4": KernelFormat(2, 4, 8, True),
}
"""Number formats of the kernels by the name of their ONNX quant."""


class PackedWeights(TypedDict):
    """Packed weights of one format in a graph: ggml's type id, their count, fraction of zeros."""

    quant: int
    weights: int
    zeros: float


@dataclass(frozen=True)
class SparseMatrix:
    """A sparse matrix of O rows, as the kernels read it."""

    heads_OP: Bytes
    values: Bytes  # with the slack behind them
    offsets: NDArray[np.int64]  # O + 1: starts of the rows in values, and the end


def to_sparse(kind: KernelFormat, packed_OP: Bytes) -> SparseMatrix:
    """Return the sparse matrix of packed rows of a number format."""
    O, P = packed_OP.shape
    step = max(1, _SLAB_WEIGHTS // kind.row_length(P))
    starts = range(0, O, step)
    slabs = [_split_rows(kind, packed_OP[start : start + step]) for start in starts]

    heads, values, sizes = zip(*slabs, strict=True)
    slack = np.zeros(SLACK_BYTES, np.uint8)
    offsets = np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum()
    return SparseMatrix(np.concatenate(heads), np.concatenate([*values, slack]), offsets)


def _split_rows(kind: KernelFormat, packed_OP: Bytes) -> tuple[Bytes, Bytes, NDArray[np.int64]]:
    """Return heads_OP, the values, and bytes_O, the bytes of values in each row."""
    code_bytes = kind.code_bytes(kind.row_length(packed_OP.shape[1]))
    code_OI = _unpack_codes(kind, packed_OP[:, :code_bytes])
    code_OI = _order_by_bits(kind, code_OI)
    keep_OI = code_OI != kind.zero_code

    index, bytes_O = _find_slots(kind, keep_OI)
    slots = np.zeros(int(bytes_O.sum()) * 8 // kind.code_bits, dtype=code_OI.dtype)
    slots[index] = code_OI[keep_OI]

    O, I = keep_OI.shape
    scale_OP = packed_OP[:, code_bytes:]
    # A row may end within a group; the other scales of the group are zero.
    padding = (0, 0), (0, kind.scale_bytes(I) - scale_OP.shape[1])
    scale_OGP = np.pad(scale_OP, padding).reshape(O, I // _GROUP, -1)
    mask_OP = np.packbits(keep_OI, axis=1, bitorder="little")
    mask_OGP = mask_OP.reshape(O, I // _GROUP, -1)
    heads_OP = np.concatenate([scale_OGP, mask_OGP], axis=2).reshape(O, -1)

    return heads_OP, _pack_codes(kind, slots), bytes_O


def from_sparse(kind: KernelFormat, matrix: SparseMatrix, I: int) -> Bytes:
    """Return the packed rows of a matrix; a ValueError if its parts do not fit each other or I."""
    _check(kind, matrix, I)

    O = len(matrix.heads_OP)
    code_bytes = kind.code_bytes(I)
    scale_bytes = kind.scale_bytes(I)
    packed_OP = np.empty((O, code_bytes + scale_bytes), dtype=np.uint8)

    step = max(1, _SLAB_WEIGHTS // I)
    for start in range(0, O, step):
        rows = slice(start, start + step)
        scale_OP, keep_OI = _split_heads(kind, matrix.heads_OP[rows])
        if _order_by_weights(kind, keep_OI)[:, I:].any():
            raise ValueError("a mask has bits behind the end of its row")

        # The kept codes, in the order of their mask bits.
        index, bytes_O = _find_slots(kind, keep_OI)
        offsets = matrix.offsets[start : start + len(keep_OI) + 1]
        if not np.array_equal(bytes_O, np.diff(offsets)):
            raise ValueError("the mask of a row keeps another number of values than it has")

        slots = _unpack_codes(kind, matrix.values[offsets[0] : offsets[-1]])
        code_OI = np.full(keep_OI.shape, kind.zero_code, slots.dtype)
        code_OI[keep_OI] = slots[index]

        code_OI = _order_by_weights(kind, code_OI)
        packed_OP[rows, :code_bytes] = _pack_codes(kind, code_OI[:, :I])
        packed_OP[rows, code_bytes:] = scale_OP[:, :scale_bytes]

    return packed_OP


def _check(kind: KernelFormat, matrix: SparseMatrix, I: int) -> None:
    O, P = matrix.heads_OP.shape
    offsets = matrix.offsets

    groups = -(-I // _GROUP)
    fits = I >= 1 and I % BLOCK == 0 and groups * kind.head_bytes == P
    if not fits or offsets.shape != (O + 1,):
        parts = f"heads of shape {O} × {P} and {offsets.size} offsets"
        raise ValueError(f"{parts} do not fit rows of {I} weights")

    # Compare, do not subtract: differences of hostile offsets may overflow.
    ascending = bool((offsets[1:] >= offsets[:-1]).all())
    end = matrix.values.size - SLACK_BYTES
    if offsets[0] != 0 or not ascending or offsets[-1] != end:
        size_bytes = matrix.values.size
        raise ValueError(f"the offsets do not end where the {size_bytes} bytes of values do")


def _order_by_bits(kind: KernelFormat, code_OI: NDArray[Any]) -> NDArray[Any]:
    """Return the codes in the order of the mask bits, padded with zeros to whole groups."""
    padding = (0, 0), (0, -code_OI.shape[1] % _GROUP)
    code_OI = np.pad(code_OI, padding, constant_values=kind.zero_code)
    # In a group, 8 blocks of 4 chunks of 8 weights become 4 chunks of 8 blocks of 8 weights.
    return _swap_chunks(code_OI, 8, 4) if kind.has_scales else code_OI


def _order_by_weights(kind: KernelFormat, value_OI: NDArray[Any]) -> NDArray[Any]:
    """Return values in the order of the weights, given those in the order of the mask bits."""
    return _swap_chunks(value_OI, 4, 8) if kind.has_scales else value_OI


def _swap_chunks(value_OI: NDArray[Any], outer: int, inner: int) -> NDArray[Any]:
    O, I = value_OI.shape
    chunks = value_OI.reshape(O, -1, outer, inner, 8)
    return chunks.swapaxes(2, 3).reshape(O, I)


def _unpack_codes(kind: KernelFormat, stored: Bytes) -> NDArray[Any]:
    """Return the codes, one an element; rows stay rows."""
    match kind.code_bits:
        case 4:
            halves = stored & 15, stored >> 4
            return np.stack(halves, axis=-1).reshape(*stored.shape[:-1], -1)
        case 16:
            return np.ascontiguousarray(stored).view("<u2")
    return stored


def _pack_codes(kind: KernelFormat, codes: NDArray[Any]) -> Bytes:
    match kind.code_bits:
        case 4:
            return np.asarray(codes[..., ::2] | codes[..., 1::2] << np.uint8(4))
        case 16:
            return codes.astype("<u2").view(np.uint8)
    return codes


def _split_heads(kind: KernelFormat, heads_OP: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
    """Return scale_OP and keep_OI, both of whole groups and in the order of the heads."""
    O = len(heads_OP)
    head_OGP = heads_OP.reshape(O, -1, kind.head_bytes)
    scale_OP = np.ascontiguousarray(head_OGP[:, :, :-_MASK_BYTES]).reshape(O, -1)
    mask_OP = np.ascontiguousarray(head_OGP[:, :, -_MASK_BYTES:]).reshape(O, -1)
    return scale_OP, np.unpackbits(mask_OP, axis=1, bitorder="little").view(np.bool_)


def _find_slots(
    kind: KernelFormat, keep_OI: NDArray[np.bool_]
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """Return the index of each kept code in the values of these rows, and bytes_O."""
    O, I = keep_OI.shape
    if kind.code_bits != 4:
        kept_O = np.count_nonzero(keep_OI, axis=1).astype(np.int64)
        return slice(None), kept_O * (kind.code_bits // 8)

    # The first half of a group is in the low halves of the bytes, the second in the high ones:
    # each has its own rank in the row, which is the number of its byte.
    half = np.arange(I) // (_GROUP // 2) % 2
    rank_OI = np.empty((O, I), dtype=np.int64)

    for columns in (half == 0, half == 1):
        rank_OI[:, columns] = np.cumsum(keep_OI[:, columns], axis=1)

    # The longer half decides how many bytes the row has: its last rank is at the end of the half.
    last = [I - 1 - _GROUP // 2, I - 1]
    bytes_O = rank_OI[:, last].max(axis=1)
    start_O = np.cumsum(bytes_O) - bytes_O
    byte_OI = start_O[:, None] + rank_OI - 1
    return (2 * byte_OI + half)[keep_OI], bytes_O
