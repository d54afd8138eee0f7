"""BF16: the upper half of a float32, rounded to nearest even."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import numpy_ggml
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["bf16"].number
BITS = 16.0
BLOCK = 1
PRESERVES_ZERO = True

dequantize = partial(numpy_ggml.dequantize, GGML_TYPE)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows, bit for bit what ggml's C code writes, whatever the importance."""
    return numpy_ggml.quantize(GGML_TYPE, weight_OI)
