"""IQ4_XS: 4-bit places in a table that has no zero, a scale for each 32 weights and each 256."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml

FORMATS = ("gguf",)
GGML_TYPE = 23
BITS = 4.25
BLOCK_SIZE = 256
PRESERVES_ZERO = False


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows, written by ggml."""
    return ggml.quantize(GGML_TYPE, weight_OI, importance_I)


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights, as ggml reads them."""
    return ggml.dequantize(GGML_TYPE, packed_OP, I)
