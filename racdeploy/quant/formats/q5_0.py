"""Q5_0: 32 signed 5-bit codes and a half-precision scale; code 16 is zero."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy.quant import join_blocks, leading_scales, pair_nibbles, search

FORMATS = ("gguf",)
GGML_TYPE = 6
BITS = 5.5
BLOCK = 32
CODES = (-16, 15)
PRESERVES_ZERO = True
_SPANS = (0.95, 1.2)
_TRIALS = 8
_TYPE = GGMLQuantizationType(GGML_TYPE)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows: bit for bit what ggml's C code writes, or with the scales that an importance asks for."""
    if importance_I is None:
        return quants.quantize(weight_OI, _TYPE)
    step_OB, code_OI = search.choose_codes(weight_OI, importance_I, BLOCK, CODES, _SPANS, _TRIALS)
    code_OBK = (code_OI + 16).view(np.uint8).reshape(*step_OB.shape, BLOCK)
    high_OB4 = np.packbits(code_OBK >> np.uint8(4), axis=-1, bitorder="little")
    return join_blocks(step_OB, high_OB4, pair_nibbles(code_OBK & np.uint8(15)))


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, _TYPE)
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


def steps(packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scale of every block."""
    return leading_scales(packed_OP, 22)
