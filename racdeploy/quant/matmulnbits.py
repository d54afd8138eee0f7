"""Quant blocks of onnxruntime's MatMulNBits: 32 unsigned codes, a scale, and a zero point.

A packed row is its codes, its scales in half precision, and its zero points if the format has them.
The ONNX file stores the same scales in float32, as the operator expects.
Source: contrib operator ``com.microsoft.MatMulNBits``, onnxruntime 1.32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant.grid import Bytes, Floats, Grid, GridCodes, whole_codes

BLOCK_SIZE = 32


def zero_code(bits: int) -> int:
    """Return the code of zero without zero points: the middle one."""
    return 1 << (bits - 1)


@dataclass(frozen=True)
class MatMulNBitsBlocks:
    """Quantized rows, 4 or 8 bits per code; without zero_OG the middle code is zero."""

    bits: int
    code_OI: Bytes
    scale_OG: NDArray[np.float16]
    zero_OG: Bytes | None = None

    @property
    def code_OP(self) -> Bytes:
        """Codes as MatMulNBits stores them: 4-bit codes two per byte, the first one low."""
        return self.code_OI if self.bits == 8 else _pack_nibbles(self.code_OI)

    @property
    def zero_OP(self) -> Bytes | None:
        """Zero points, packed like codes; of an odd number the last has its own byte."""
        if self.zero_OG is None or self.bits == 8:
            return self.zero_OG

        odd = self.zero_OG.shape[1] % 2
        return _pack_nibbles(np.pad(self.zero_OG, ((0, 0), (0, odd))))

    def pack(self) -> Bytes:
        """Return packed_OP: codes, scales, zero points."""
        scale_OP = np.ascontiguousarray(self.scale_OG).view(np.uint8)
        parts = [self.code_OP, scale_OP]
        if self.zero_OP is not None:
            parts.append(self.zero_OP)
        return np.concatenate(parts, axis=1)

    @classmethod
    def read(
        cls, packed_OP: Bytes, I: int, bits: int, *, zero_points: bool = False
    ) -> MatMulNBitsBlocks:
        """Unpack rows of ``I`` weights."""
        G = I // BLOCK_SIZE
        code_end = I * bits // 8
        scale_end = code_end + 2 * G

        zero_bytes = -(-G * bits // 8) if zero_points else 0
        row_bytes = packed_OP.shape[1]
        assert row_bytes == scale_end + zero_bytes, "packed rows do not match the row length"

        code_OP, scale_OP, zero_OP = np.split(packed_OP, [code_end, scale_end], axis=1)
        code_OI = code_OP if bits == 8 else unpack_nibbles(code_OP, I)

        scale_OG = np.ascontiguousarray(scale_OP).view("<f2")
        zero_OG = unpack_nibbles(zero_OP, G) if zero_points else None
        return cls(bits, code_OI, scale_OG, zero_OG)

    def dequantize(self) -> Floats:
        """Return float32 weight_OI: (code − zero) · scale, as onnxruntime computes it."""
        code_OGS = self.code_OI.reshape(len(self.code_OI), -1, BLOCK_SIZE).astype(np.float32)
        if self.zero_OG is None:
            code_OGS -= np.float32(zero_code(self.bits))
        else:
            code_OGS -= self.zero_OG[:, :, None]
        weight_OGS = code_OGS * self.scale_OG.astype(np.float32)[:, :, None]
        return weight_OGS.reshape(self.code_OI.shape)


@dataclass(frozen=True, kw_only=True)
class MatMulNBitsCodec:
    """Codec of a number format of MatMulNBits.

    Args:
        code_bits: 4 or 8.
        make_blocks: returns the blocks of weight_OI.
        has_zero_points: True if each block has a zero point.
    """

    code_bits: int
    make_blocks: Callable[[Floats], MatMulNBitsBlocks]
    has_zero_points: bool = False

    @property
    def bits(self) -> float:
        zero_point_bits = self.code_bits if self.has_zero_points else 0
        return self.code_bits + (16 + zero_point_bits) / BLOCK_SIZE

    @property
    def block_size(self) -> int:
        if self.has_zero_points and self.code_bits == 4:
            return 2 * BLOCK_SIZE  # two zero points share a byte
        return BLOCK_SIZE

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
        return self.make_blocks(weight_OI).pack()

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats:
        return self.unpack(packed_OP, I).dequantize()

    def unpack(self, packed_OP: Bytes, I: int) -> MatMulNBitsBlocks:
        """Return the blocks of rows of ``I`` weights."""
        return MatMulNBitsBlocks.read(
            packed_OP, I, self.code_bits, zero_points=self.has_zero_points
        )


def quantize_symmetric(weight_OI: Floats, bits: int) -> MatMulNBitsBlocks:
    """Quantize as onnxruntime: the weight of largest magnitude gets the lowest code."""
    weight_OGS = weight_OI.reshape(len(weight_OI), -1, BLOCK_SIZE)
    index_OG1 = np.abs(weight_OGS).argmax(axis=2, keepdims=True)
    extreme_OG = np.take_along_axis(weight_OGS, index_OG1, axis=2)[:, :, 0]
    scale_OG = (extreme_OG / -np.float32(zero_code(bits))).astype(np.float16)
    return MatMulNBitsBlocks(
        bits, round_to_codes(weight_OI, scale_OG.astype(np.float32), bits), scale_OG
    )


def round_to_codes(weight_OI: Floats, scale_OG: Floats, bits: int) -> Bytes:
    """Return the nearest codes; a block of zeros has the scale 0 and the middle code."""
    weight_OGS = weight_OI.reshape(len(weight_OI), -1, BLOCK_SIZE)
    code_OGS = weight_OGS * invert(scale_OG)[:, :, None] + np.float32(zero_code(bits))
    max_code = np.float32((1 << bits) - 1)
    # onnxruntime rounds halves up, numpy's rint rounds them to even.
    code_OGS = np.clip(np.floor(code_OGS + np.float32(0.5)), 0, max_code)
    return np.asarray(code_OGS.reshape(weight_OI.shape).astype(np.uint8))


def invert(scale: Floats) -> Floats:
    """Return 1 / scale, and 0 for the scale 0 of a block of zeros."""
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _pack_nibbles(code_OI: Bytes) -> Bytes:
    return code_OI[:, ::2] | code_OI[:, 1::2] << np.uint8(4)


def unpack_nibbles(code_OP: Bytes, count: int) -> Bytes:
    """Return the first ``count`` four-bit codes of each row."""
    code_OP2 = np.stack([code_OP & 15, code_OP >> 4], axis=2)
    return code_OP2.reshape(len(code_OP), -1)[:, :count]


def make_symmetric_grid(bits: int) -> Grid:
    """Return the grid of codes without zero points."""
    middle = zero_code(bits)
    return Grid(
        values=whole_codes(-middle, middle - 1),
        block_size=BLOCK_SIZE,
        group_size=BLOCK_SIZE,
        pack=partial(_pack_symmetric, bits=bits),
    )


def _pack_symmetric(codes: GridCodes, bits: int) -> Bytes:
    return MatMulNBitsBlocks(bits, codes.code_OI, codes.scale_OX.astype(np.float16)).pack()
