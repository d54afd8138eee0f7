"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy.quant import leading_scales

__all__ = ["BITS", "BLOCK", "CODES", "FORMATS", "GGML_TYPE", "PRESERVES_ZERO", "dequantize", "quantize", "steps"]

FORMATS = ("gguf",)
GGML_TYPE = 2
BITS = 4.5
BLOCK = 32
CODES = (-8, 7)
PRESERVES_ZERO = True
_TYPE = GGMLQuantizationType(GGML_TYPE)


def quantize(weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return packed rows, bit for bit what ggml's C code writes."""
    return quants.quantize(weight_OI, _TYPE)


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, _TYPE)
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


def steps(packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scale of every block."""
    return leading_scales(packed_OP, 18)
