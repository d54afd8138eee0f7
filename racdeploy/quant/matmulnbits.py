"""Blocks of onnxruntime's MatMulNBits: 32 weights, unsigned codes, one scale, and a code that means zero.

A packed row is its codes, then its scales in half precision, then, where they differ from block to block, the zero
points. The file has the same scales in float32, which the operator takes.
Source: contrib operator ``com.microsoft.MatMulNBits``, docs/ContribOperators.md of onnxruntime 1.32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


@dataclass(frozen=True)
class Blocks:
    """Rows of blocks.

    Args:
        bits: of a code, 4 or 8.
        code_OI: uint8.
        scale_OG: float16, one for each block.
        zero_OG: uint8, the code that means zero; None where that is the middle of the range.
    """

    bits: int
    code_OI: NDArray[np.uint8]
    scale_OG: NDArray[np.float16]
    zero_OG: NDArray[np.uint8] | None = None

    @property
    def code_OP(self) -> NDArray[np.uint8]:
        """Codes as MatMulNBits stores them: of four bits two in a byte, the first one low."""
        return self.code_OI if self.bits == 8 else _pairs(self.code_OI)

    @property
    def zero_OP(self) -> NDArray[np.uint8] | None:
        """Zero points, packed like codes; an odd last one is alone in its byte."""
        if self.zero_OG is None or self.bits == 8:
            return self.zero_OG
        odd = self.zero_OG.shape[1] % 2
        return _pairs(np.pad(self.zero_OG, ((0, 0), (0, odd))))

    def packed(self) -> NDArray[np.uint8]:
        """Return packed_OP."""
        scale_OP = np.ascontiguousarray(self.scale_OG).view(np.uint8)
        parts = [self.code_OP, scale_OP, *([] if self.zero_OP is None else [self.zero_OP])]
        return np.concatenate(parts, axis=1)

    @classmethod
    def read(
        cls, packed_OP: NDArray[np.uint8], I: int, bits: int, *, zero_points: bool = False
    ) -> Blocks:
        """Read packed rows of that many weights."""
        groups, code_bytes = I // BLOCK, I * bits // 8
        scale_end = code_bytes + 2 * groups
        zero_bytes = -(-groups * bits // 8) if zero_points else 0
        assert packed_OP.shape[1] == scale_end + zero_bytes, (
            "packed rows do not match the row length"
        )
        code_OP = packed_OP[:, :code_bytes]
        code_OI = code_OP if bits == 8 else _split(code_OP, I)
        scale_OG = np.ascontiguousarray(packed_OP[:, code_bytes:scale_end]).view("<f2")
        zero_OG = _split(packed_OP[:, scale_end:], groups) if zero_points else None
        return cls(bits, code_OI, scale_OG, zero_OG)

    def weights(self) -> NDArray[np.float32]:
        """Return float32 weight_OI: (code − zero) · scale, as onnxruntime computes it."""
        O, I = self.code_OI.shape
        code_OGS = self.code_OI.reshape(O, -1, BLOCK).astype(np.float32)
        middle = np.float32(1 << (self.bits - 1))
        zero_OG1 = middle if self.zero_OG is None else self.zero_OG.astype(np.float32)[:, :, None]
        weight_OGS = (code_OGS - zero_OG1) * self.scale_OG.astype(np.float32)[:, :, None]
        return np.asarray(weight_OGS.reshape(O, I), dtype=np.float32)


def choose_symmetric(weight_OI: NDArray[np.float32], bits: int) -> Blocks:
    """Return blocks whose weight of largest magnitude has the lowest code, as onnxruntime's quantizer chooses it."""
    O, I = weight_OI.shape
    weight_OGS = weight_OI.reshape(O, I // BLOCK, BLOCK)
    place_OG1 = np.abs(weight_OGS).argmax(axis=2, keepdims=True)
    scale_OG = np.take_along_axis(weight_OGS, place_OG1, axis=2)[:, :, 0] / np.float32(
        -(1 << (bits - 1))
    )
    scale_OG = scale_OG.astype(np.float16)
    return Blocks(bits, codes(weight_OI, scale_OG.astype(np.float32), bits), scale_OG)


def codes(
    weight_OI: NDArray[np.float32], scale_OG: NDArray[np.float32], bits: int
) -> NDArray[np.uint8]:
    """Return the nearest codes at those scales; a block of zeros has the scale 0 and the middle code."""
    O, I = weight_OI.shape
    middle, most = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    inverse_OG = np.divide(
        np.float32(1), scale_OG, out=np.zeros_like(scale_OG), where=scale_OG != 0
    )
    code_OGS = weight_OI.reshape(O, -1, BLOCK) * inverse_OG[:, :, None] + middle
    code_OGS = np.clip(np.floor(code_OGS + np.float32(0.5)), 0, most)
    return np.asarray(code_OGS.reshape(O, I).astype(np.uint8))


def _pairs(code_OI: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return code_OI[:, ::2] | code_OI[:, 1::2] << np.uint8(4)


def _split(code_OP: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    return np.stack([code_OP & 15, code_OP >> 4], axis=2).reshape(len(code_OP), -1)[:, :count]
