"""The sparse matrices of the kernels: of each 256 weights of a row a head, and the codes kept.

A head is 8 scales in half precision, where the number format has scales, and a mask of 256 bits,
low bits first. With scales the bits stand for the weights in chunks: first weights 0 to 7 of each
of the 8 blocks of 32, then weights 8 to 15, and so on. The values of a row follow each other in the
order of the bits: codes of 8 or 16 bits as they are; those of 4 bits in two streams, chunks 0 and 1
of every group in the low halves of the bytes and chunks 2 and 3 in the high ones. ``offsets`` say
where each row begins in ``values``; behind the last value are ``SLACK_BYTES`` that kernels may
read. Little-endian throughout. Source: ``kernels/sources/sparse_matrix.h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

LAYOUT = 2  # changes with the form: the version of the operator's domain in a graph
OPERATOR_DOMAIN = "racdeploy"
ACCEL_KEY = "racdeploy.accel"
"""Property of a graph with matrices of this form: a list of :class:`Packed`, as JSON."""
SLACK_BYTES = 128
BLOCK = 32
"""Weights that share a scale."""
_GROUP = 256  # weights of a head
_MASK_BYTES = _GROUP // 8
_SCALE_BYTES = 2
_SLAB_WEIGHTS = 4_194_304  # worked on at a time, which bounds the memory
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One number format; a packed row has its codes, then its scales."""

    ggml_type: int  # of the format that has the same codes and scales
    bits: int  # of a code
    zero: int  # the code that is left out
    scaled: bool  # whether 32 weights share a scale

    @property
    def head_bytes(self) -> int:
        return _MASK_BYTES + self.scale_bytes(_GROUP)

    def scale_bytes(self, I: int) -> int:
        return I // BLOCK * _SCALE_BYTES if self.scaled else 0

    def code_bytes(self, I: int) -> int:
        return I * self.bits // 8

    def row_length(self, row_bytes: int) -> int:
        return row_bytes * BLOCK // (self.code_bytes(BLOCK) + self.scale_bytes(BLOCK))


KINDS = {
    "f16": Kind(1, 16, 0, False),
    "matmulnbits_8": Kind(8, 8, 128, True),
    "matmulnbits_4": Kind(2, 4, 8, True),
}
"""What the kernels know, by the quant of ONNX."""


class Packed(TypedDict):
    """What a graph says of its packed weights of one format: ggml's number, count, zeros' share."""

    quant: int
    weights: int
    zeros: float


def accel_name(model: str) -> str:
    """Return the name of the graph with such matrices beside a plain one."""
    return f"{model.removesuffix('.onnx')}.accel.onnx"


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix of O rows, as the kernels read it."""

    heads_OP: Bytes
    values: Bytes  # with the slack behind them
    offsets: NDArray[np.int64]  # O + 1 of them


def split(kind: Kind, packed_OP: Bytes) -> SparseMatrix:
    """Return the sparse matrix of packed rows of a number format."""
    O, P = packed_OP.shape
    step = max(1, _SLAB_WEIGHTS // kind.row_length(P))
    starts = range(0, O, step)
    slabs = [_split_rows(kind, packed_OP[start : start + step]) for start in starts]

    heads, values, sizes = zip(*slabs, strict=True)
    slack = np.zeros(SLACK_BYTES, np.uint8)
    offsets = np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum()
    return SparseMatrix(np.concatenate(heads), np.concatenate([*values, slack]), offsets)


def _split_rows(kind: Kind, packed_OP: Bytes) -> tuple[Bytes, Bytes, NDArray[np.int64]]:
    """Return heads_OP, values and bytes_O of rows."""
    code_bytes = kind.code_bytes(kind.row_length(packed_OP.shape[1]))
    code_OI = _unpack_codes(kind, packed_OP[:, :code_bytes])
    code_OI = _order_by_bits(kind, code_OI)
    keep_OI = code_OI != kind.zero

    place, bytes_O = _find_places(kind, keep_OI)
    slots = np.zeros(int(bytes_O.sum()) * 8 // kind.bits, dtype=code_OI.dtype)
    slots[place] = code_OI[keep_OI]

    heads_OP = _join_heads(kind, keep_OI, packed_OP[:, code_bytes:])
    return heads_OP, _pack_codes(kind, slots), bytes_O


def join(kind: Kind, matrix: SparseMatrix, I: int) -> Bytes:
    """Return the packed rows again; parts that do not fit each other or I are a ValueError."""
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

        code_OI = _restore_codes(kind, matrix, start, keep_OI)
        code_OI = _order_by_weights(kind, code_OI)
        packed_OP[rows, :code_bytes] = _pack_codes(kind, code_OI[:, :I])
        packed_OP[rows, code_bytes:] = scale_OP[:, :scale_bytes]

    return packed_OP


def _restore_codes(
    kind: Kind, matrix: SparseMatrix, start: int, keep_OI: NDArray[np.bool_]
) -> NDArray[Any]:
    """Return the codes of rows from ``start`` on, in the order of their mask bits."""
    place, bytes_O = _find_places(kind, keep_OI)
    offsets = matrix.offsets[start : start + len(keep_OI) + 1]
    if not np.array_equal(bytes_O, np.diff(offsets)):
        raise ValueError("the masks of a row and its values are not equally many")

    slots = _unpack_codes(kind, matrix.values[offsets[0] : offsets[-1]])
    code_OI = np.full(keep_OI.shape, kind.zero, slots.dtype)
    code_OI[keep_OI] = slots[place]
    return code_OI


def _check(kind: Kind, matrix: SparseMatrix, I: int) -> None:
    O, P = matrix.heads_OP.shape
    offsets = matrix.offsets

    groups = -(-I // _GROUP)
    fits = I >= 1 and I % BLOCK == 0 and groups * kind.head_bytes == P
    if not fits or offsets.shape != (O + 1,):
        what = f"heads of shape {O} × {P} and {offsets.size} offsets"
        raise ValueError(f"{what} are not of rows of {I} weights")

    # Compared, not subtracted: differences of hostile offsets may overflow.
    ascending = bool((offsets[1:] >= offsets[:-1]).all())
    end = matrix.values.size - SLACK_BYTES
    if offsets[0] != 0 or not ascending or offsets[-1] != end:
        size_bytes = matrix.values.size
        raise ValueError(f"the offsets do not end where the {size_bytes} bytes of values do")


def _order_by_bits(kind: Kind, code_OI: NDArray[Any]) -> NDArray[Any]:
    """Return the codes of whole groups in the order of the mask bits."""
    padding = (0, 0), (0, -code_OI.shape[1] % _GROUP)
    code_OI = np.pad(code_OI, padding, constant_values=kind.zero)
    # Of a group: 8 blocks of 4 chunks of 8 weights become 4 chunks of 8 blocks of 8 weights.
    return _swap_chunks(code_OI, 8, 4) if kind.scaled else code_OI


def _order_by_weights(kind: Kind, value_OI: NDArray[Any]) -> NDArray[Any]:
    """Return what belongs to the mask bits in the order of the weights."""
    return _swap_chunks(value_OI, 4, 8) if kind.scaled else value_OI


def _swap_chunks(value_OI: NDArray[Any], outer: int, inner: int) -> NDArray[Any]:
    O, I = value_OI.shape
    chunks = value_OI.reshape(O, -1, outer, inner, 8)
    return chunks.swapaxes(2, 3).reshape(O, I)


def _unpack_codes(kind: Kind, stored: Bytes) -> NDArray[Any]:
    """Return one code in each element; of an array of rows, rows."""
    match kind.bits:
        case 4:
            halves = stored & 15, stored >> 4
            return np.stack(halves, axis=-1).reshape(*stored.shape[:-1], -1)
        case 16:
            return np.ascontiguousarray(stored).view("<u2")
    return stored


def _pack_codes(kind: Kind, codes: NDArray[Any]) -> Bytes:
    match kind.bits:
        case 4:
            return np.asarray(codes[..., ::2] | codes[..., 1::2] << np.uint8(4))
        case 16:
            return codes.astype("<u2").view(np.uint8)
    return codes


def _join_heads(kind: Kind, keep_OI: NDArray[np.bool_], scale_OP: Bytes) -> Bytes:
    O, I = keep_OI.shape
    # A row may end within a group, whose other scales are zero.
    padding = (0, 0), (0, kind.scale_bytes(I) - scale_OP.shape[1])
    scale_OGP = np.pad(scale_OP, padding).reshape(O, I // _GROUP, -1)
    mask_OP = np.packbits(keep_OI, axis=1, bitorder="little")
    mask_OGP = mask_OP.reshape(O, I // _GROUP, -1)
    return np.concatenate([scale_OGP, mask_OGP], axis=2).reshape(O, -1)


def _split_heads(kind: Kind, heads_OP: Bytes) -> tuple[Bytes, NDArray[np.bool_]]:
    """Return scale_OP and keep_OI of whole groups."""
    O = len(heads_OP)
    head_OGP = heads_OP.reshape(O, -1, kind.head_bytes)
    scale_OP = np.ascontiguousarray(head_OGP[:, :, :-_MASK_BYTES]).reshape(O, -1)
    mask_OP = np.ascontiguousarray(head_OGP[:, :, -_MASK_BYTES:]).reshape(O, -1)
    return scale_OP, np.unpackbits(mask_OP, axis=1, bitorder="little").view(np.bool_)


def _find_places(
    kind: Kind, keep_OI: NDArray[np.bool_]
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """Return the place of each kept code in the values of its rows, and bytes_O."""
    O, I = keep_OI.shape
    if kind.bits != 4:
        kept_O = np.count_nonzero(keep_OI, axis=1).astype(np.int64)
        return slice(None), kept_O * (kind.bits // 8)

    # The first half of a group is in the low halves of the bytes, the second in the high ones:
    # each has its own rank in the row, which is the number of its byte.
    half = np.arange(I) // (_GROUP // 2) % 2
    rank_OI = np.empty((O, I), dtype=np.int64)

    for columns in (half == 0, half == 1):
        rank_OI[:, columns] = np.cumsum(keep_OI[:, columns], axis=1)

    # The longer stream says how many bytes the row has: its last rank is at the end of that half.
    last = [I - 1 - _GROUP // 2, I - 1]
    bytes_O = rank_OI[:, last].max(axis=1)
    start_O = np.cumsum(bytes_O) - bytes_O
    byte_OI = start_O[:, None] + rank_OI - 1
    return (2 * byte_OI + half)[keep_OI], bytes_O
