"""The sparse matrices of the kernels in numpy: of each row of 256 weights a head, and the codes that are not zero.

A head is 8 scales in half precision, where the number format has scales, and a mask of 256 bits, low bits first. With
scales the bits stand for the weights in chunks: first weights 0 to 7 of each of the 8 blocks of 32, then weights 8 to
15, and so on. The values of a row follow each other in the order of the bits: codes of 8 or 16 bits as they are; those
of 4 bits in two streams, chunks 0 and 1 of every group in the low halves of the bytes and chunks 2 and 3 in the high
ones. ``offsets`` say where each row begins in ``values``; behind the last value are ``SLACK_BYTES`` that kernels may
read. Little-endian throughout. Source: ``racdeploy/accel/sources/sparse_matrix.h``.
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
_GROUP = 256
_SLAB_WEIGHTS = 4_194_304
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Kind:
    """One number format.

    Args:
        ggml_type: ggml's number of the format that has the same codes and scales.
        bits: of a code.
        zero: the code that is left out.
        scaled: whether 32 weights share a scale.
    """

    ggml_type: int
    bits: int
    zero: int
    scaled: bool

    @property
    def head_bytes(self) -> int:
        """Bytes of a group's head."""
        return _GROUP // 8 + (2 * _GROUP // BLOCK if self.scaled else 0)

    def row_bytes(self, I: int) -> int:
        """Bytes of a packed row of the number format."""
        return I * self.bits // 8 + (2 * I // BLOCK if self.scaled else 0)


KINDS = {
    "f16": Kind(1, 16, 0, False),
    "matmulnbits_8": Kind(8, 8, 128, True),
    "matmulnbits_4": Kind(2, 4, 8, True),
}
"""What the kernels know, by the quant of ONNX."""


class Packed(TypedDict):
    """What a graph says of its packed weights of one quant: ggml's number, how many, and the fraction of zeros."""

    quant: int
    weights: int
    zeros: float


def accel_name(model: str) -> str:
    """Return the name of the graph with such matrices beside a plain one."""
    return f"{model.removesuffix('.onnx')}.accel.onnx"


@dataclass(frozen=True)
class SparseMatrix:
    """A matrix of O rows, as the kernels read it.

    Args:
        heads_OP: uint8.
        values: uint8, with the slack behind them.
        offsets: int64, O + 1 of them.
    """

    heads_OP: Bytes
    values: Bytes
    offsets: NDArray[np.int64]

    @property
    def size_bytes(self) -> int:
        """Bytes of all three."""
        return self.heads_OP.nbytes + self.values.nbytes + self.offsets.nbytes


def split(kind: Kind, packed_OP: Bytes) -> SparseMatrix:
    """Return the sparse matrix of packed rows of a number format."""
    O, P = packed_OP.shape
    I = _row_length(kind, P)
    heads, values, counts = [], [], []
    for start in range(0, O, step := max(1, _SLAB_WEIGHTS // I)):
        rows_OP = packed_OP[start : start + step]
        code_ON = _in_chunks(kind, _codes(kind, rows_OP[:, : I * kind.bits // 8]))
        keep_ON = code_ON != kind.zero
        scale_OP = rows_OP[:, I * kind.bits // 8 :]
        heads.append(_heads(kind, keep_ON, scale_OP))
        kept, bytes_O = _kept(kind, code_ON, keep_ON)
        values.append(kept)
        counts.append(bytes_O)
    offsets = np.zeros(O + 1, dtype=np.int64)
    np.cumsum(np.concatenate(counts), out=offsets[1:])
    return SparseMatrix(
        np.concatenate(heads), np.concatenate([*values, np.zeros(SLACK_BYTES, np.uint8)]), offsets
    )


def join(kind: Kind, matrix: SparseMatrix, I: int) -> Bytes:
    """Return the packed rows again.

    Raises:
        ValueError: heads, values and offsets do not fit each other, or not rows of that many weights.
    """
    heads_OP, offsets = matrix.heads_OP, matrix.offsets
    O = len(heads_OP)
    _check(kind, matrix, I)
    packed_OP = np.empty((O, kind.row_bytes(I)), dtype=np.uint8)
    for start in range(0, O, step := max(1, _SLAB_WEIGHTS // I)):
        stop = min(start + step, O)
        head_OGP = heads_OP[start:stop].reshape(stop - start, -1, kind.head_bytes)
        mask_OP = np.ascontiguousarray(head_OGP[:, :, -_GROUP // 8 :]).reshape(stop - start, -1)
        keep_ON = np.unpackbits(mask_OP, axis=1, bitorder="little").view(np.bool_)
        if _in_rows(kind, keep_ON)[:, I:].any():
            raise ValueError("a mask has bits behind the end of its row")
        place, bytes_O = _places(kind, keep_ON)
        if not np.array_equal(bytes_O, np.diff(offsets[start : stop + 1])):
            raise ValueError("the masks of a row and its values are not equally many")
        code_ON = np.full(
            keep_ON.shape, kind.zero, dtype=np.uint16 if kind.bits == 16 else np.uint8
        )
        code_ON[keep_ON] = _take(kind, matrix.values[offsets[start] : offsets[stop]], place)
        packed_OP[start:stop, : I * kind.bits // 8] = _code_bytes(
            kind, _in_rows(kind, code_ON)[:, :I]
        )
        if kind.scaled:
            scale_OP = np.ascontiguousarray(head_OGP[:, :, : -_GROUP // 8]).reshape(
                stop - start, -1
            )
            packed_OP[start:stop, I * kind.bits // 8 :] = scale_OP[:, : 2 * I // BLOCK]
    return packed_OP


def _row_length(kind: Kind, row_bytes: int) -> int:
    return row_bytes * BLOCK // kind.row_bytes(BLOCK)


def _check(kind: Kind, matrix: SparseMatrix, I: int) -> None:
    O, P = matrix.heads_OP.shape
    offsets = matrix.offsets
    if I < 1 or I % BLOCK or -(-I // _GROUP) * kind.head_bytes != P or offsets.shape != (O + 1,):
        raise ValueError(
            f"heads of shape {O} × {P} and {offsets.size} offsets are not of rows of {I} weights"
        )
    ascending = bool((offsets[1:] >= offsets[:-1]).all())
    if offsets[0] != 0 or not ascending or offsets[-1] != matrix.values.size - SLACK_BYTES:
        raise ValueError(
            f"the offsets do not end where the {matrix.values.size} bytes of values do"
        )


def _in_chunks(kind: Kind, code_OI: NDArray[Any]) -> NDArray[Any]:
    """Return the codes of whole groups in the order of the mask bits."""
    O, I = code_OI.shape
    code_OI = np.pad(code_OI, ((0, 0), (0, -I % _GROUP)), constant_values=kind.zero)
    return code_OI.reshape(O, -1, 8, 4, 8).swapaxes(2, 3).reshape(O, -1) if kind.scaled else code_OI


def _in_rows(kind: Kind, value_ON: NDArray[Any]) -> NDArray[Any]:
    """Return what belongs to the mask bits in the order of the weights."""
    O = len(value_ON)
    return (
        value_ON.reshape(O, -1, 4, 8, 8).swapaxes(2, 3).reshape(O, -1) if kind.scaled else value_ON
    )


def _codes(kind: Kind, code_OP: Bytes) -> NDArray[Any]:
    """Return code_OI, one code in each element."""
    if kind.bits == 4:
        return np.stack([code_OP & 15, code_OP >> 4], axis=2).reshape(len(code_OP), -1)
    return np.ascontiguousarray(code_OP).view("<u2") if kind.bits == 16 else code_OP


def _code_bytes(kind: Kind, code_OI: NDArray[Any]) -> Bytes:
    if kind.bits == 4:
        return np.asarray(code_OI[:, ::2] | code_OI[:, 1::2] << np.uint8(4))
    return code_OI.astype("<u2").view(np.uint8) if kind.bits == 16 else code_OI


def _heads(kind: Kind, keep_ON: NDArray[np.bool_], scale_OP: Bytes) -> Bytes:
    O, N = keep_ON.shape
    G = N // _GROUP
    head_OGP = np.zeros((O, G, kind.head_bytes), dtype=np.uint8)
    head_OGP[:, :, -_GROUP // 8 :] = np.packbits(keep_ON, axis=1, bitorder="little").reshape(
        O, G, -1
    )
    if kind.scaled:
        scales_OP = np.zeros((O, G * 2 * _GROUP // BLOCK), dtype=np.uint8)
        scales_OP[:, : scale_OP.shape[1]] = scale_OP
        head_OGP[:, :, : -_GROUP // 8] = scales_OP.reshape(O, G, -1)
    return head_OGP.reshape(O, -1)


def _kept(
    kind: Kind, code_ON: NDArray[Any], keep_ON: NDArray[np.bool_]
) -> tuple[Bytes, NDArray[np.int64]]:
    """Return the values of the rows, and how many bytes each row has."""
    kept = code_ON[keep_ON]
    place, bytes_O = _places(kind, keep_ON)
    if kind.bits != 4:
        return kept.view(np.uint8), bytes_O
    nibbles = np.zeros(2 * int(bytes_O.sum()), dtype=np.uint8)
    nibbles[place] = kept
    return nibbles[::2] | nibbles[1::2] << np.uint8(4), bytes_O


def _take(kind: Kind, values: Bytes, place: NDArray[np.int64]) -> NDArray[Any]:
    """Return the kept codes of rows whose values those are."""
    if kind.bits == 4:
        return np.asarray(np.stack([values & 15, values >> 4], axis=1).reshape(-1)[place])
    return np.ascontiguousarray(values).view("<u2") if kind.bits == 16 else values


def _places(kind: Kind, keep_ON: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the place of each kept code among half bytes, for codes of 4 bits, and the bytes of each row."""
    O, N = keep_ON.shape
    if kind.bits != 4:
        return np.empty(0, dtype=np.int64), np.count_nonzero(keep_ON, axis=1).astype(np.int64) * (
            kind.bits // 8
        )
    half = np.arange(N) // (_GROUP // 2) % 2  # of its group, and of its byte
    rank_ON = np.empty((O, N), dtype=np.int64)
    for which in (0, 1):
        rank_ON[:, half == which] = np.cumsum(keep_ON[:, half == which], axis=1)
    bytes_O = rank_ON[:, [N - 1 - _GROUP // 2, N - 1]].max(axis=1)
    start_O = np.cumsum(bytes_O) - bytes_O
    return (2 * (start_O[:, None] + rank_ON - 1) + half)[keep_ON], bytes_O
