"""gguf-py's numpy version of ggml's number formats: bit for bit what the C code writes."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray


def quantize(ggml_type: int, weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return packed_OP of float32 weights, rows of whole blocks."""
    return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))


def dequantize(ggml_type: int, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weight_OI of packed rows."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
