"""BF16: the upper half of a float32, rounded to nearest even."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

FORMATS = ("gguf",)
GGML_TYPE = 30
BITS = 16.0
BLOCK = 1
PRESERVES_ZERO = True
_TYPE = GGMLQuantizationType(GGML_TYPE)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows, bit for bit what ggml's C code writes, whatever the importance."""
    return quants.quantize(weight_OI, _TYPE)


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, _TYPE)
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
