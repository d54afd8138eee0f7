"""F16: IEEE half precision, rounded to nearest even.

Weights beyond 65504 become infinite; whoever writes a file checks for that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp16"
GGML_TYPE = GGML_TYPES["f16"].number
BITS = 16.0
BLOCK = 1
PRESERVES_ZERO = True


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return the little-endian bytes of every weight in half precision, whatever its importance."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(weight_OI).astype("<f2").view(np.uint8)


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return the weights widened to float32."""
    weight_OI = np.ascontiguousarray(packed_OP).view("<f2").astype(np.float32)
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI
