"""F32: IEEE single precision, stored as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp32"
GGML_TYPE = GGML_TYPES["f32"].number
BITS = 32.0
BLOCK = 1
PRESERVES_ZERO = True


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return the little-endian bytes of every weight; nothing is rounded."""
    return np.ascontiguousarray(weight_OI, dtype="<f4").view(np.uint8)


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return the weights, without a copy where the bytes are contiguous."""
    weight_OI = np.ascontiguousarray(packed_OP).view("<f4")
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
