"""MXFP4: 32 codes of four-bit floats (E2M1) and a power of two that they share; codes 0 and 8 are zero.

Source: OCP Microscaling Formats specification 1.0; ``quantize_row_mxfp4_ref`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy.quant import pair_nibbles

FORMATS = ("gguf",)
GGML_TYPE = 39
BITS = 4.25
BLOCK = 32
PRESERVES_ZERO = True
_TYPE = GGMLQuantizationType(GGML_TYPE)
_CHUNK_WEIGHTS = 32_768
_LARGEST = 12.0
# The magnitudes are 0, 1, 2, 3, 4, 6, 8 and 12 halves: the code of each, and 255 where there is none.
_CODE_OF_HALVES = np.array([0, 1, 2, 3, 4, 255, 5, 255, 6, 255, 255, 255, 7], dtype=np.uint8)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows: bit for bit what ggml's C code writes, or with the exponents that an importance asks for.

    ggml's exponent lets the largest weight of a block be clipped by up to a quarter; with an importance the next
    one up and the next one down are tried as well.
    """
    if importance_I is None:
        return quants.quantize(weight_OI, _TYPE)
    assert (importance_I > 0).all(), "importance must be above zero"
    O, I = weight_OI.shape
    rows = max(1, _CHUNK_WEIGHTS // I)
    weight_BK = np.tile(importance_I.astype(np.float32).reshape(-1, BLOCK), (rows, 1))
    packed_OP = np.empty((O, I // BLOCK * 17), dtype=np.uint8)
    for start in range(0, O, rows):
        value_BK = np.ascontiguousarray(weight_OI[start : start + rows]).reshape(-1, BLOCK)
        packed_OP[start : start + rows] = _choose(value_BK, weight_BK[: len(value_BK)]).reshape(
            -1, I // BLOCK * 17
        )
    return packed_OP


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, _TYPE)
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


def _choose(value_BK: NDArray[np.float32], importance_BK: NDArray[np.float32]) -> NDArray[np.uint8]:
    _, above_B = np.frexp(np.abs(value_BK).max(1))  # the largest is below 2**above
    best_B = np.full(len(value_BK), np.inf, dtype=np.float32)
    exponent_B, halves_BK = np.zeros(len(value_BK), dtype=np.uint8), np.zeros_like(value_BK)
    for shift in (0, 1, -1):
        # byte e means 2**(e - 128) for one half; ggml takes e = above - 3 + 127
        tried_B = np.clip(above_B - 3 + 127 + shift, 0, 254).astype(np.int32)
        half_B1 = np.ldexp(np.float32(1), tried_B - 128)[:, None]
        found_BK = _halves(value_BK / half_B1)
        error_BK = value_BK - found_BK * half_B1
        error_B = np.einsum("bk,bk,bk->b", error_BK, error_BK, importance_BK)
        better_B = error_B < best_B
        np.copyto(best_B, error_B, where=better_B)
        np.copyto(exponent_B, tried_B.astype(np.uint8), where=better_B)
        np.copyto(halves_BK, found_BK, where=better_B[:, None])
    code_BK = _CODE_OF_HALVES[np.abs(halves_BK).astype(np.intp)] | (halves_BK < 0).view(
        np.uint8
    ) << np.uint8(3)
    return np.concatenate([exponent_B[:, None], pair_nibbles(code_BK)], axis=1)


def _halves(ratio_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the nearest of the values of the format, in halves."""
    size_BK = np.minimum(np.abs(ratio_BK), _LARGEST)
    step_BK = np.where(
        size_BK < 4, np.float32(1), np.where(size_BK < 8, np.float32(2), np.float32(4))
    )
    nearest_BK: NDArray[np.float32] = np.copysign(np.rint(size_BK / step_BK) * step_BK, ratio_BK)
    return nearest_BK
