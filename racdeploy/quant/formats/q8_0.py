"""Q8_0: 32 signed 8-bit codes and a half-precision scale."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import join_blocks, numpy_ggml, read_leading_scales, search
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["q8_0"].number
BITS = GGML_TYPES["q8_0"].bits
BLOCK = GGML_TYPES["q8_0"].block_weights
CODES = (-127, 127)
PRESERVES_ZERO = True
_SPANS = (1.0, 1.15)
_TRIALS = 16

dequantize = partial(numpy_ggml.dequantize, GGML_TYPE)
steps = partial(read_leading_scales, block_bytes=GGML_TYPES["q8_0"].block_bytes)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows: ggml's, bit for bit, or with scales that suit an importance."""
    if importance_I is None:
        return numpy_ggml.quantize(GGML_TYPE, weight_OI)

    step_OG, code_OGS = search.choose_codes(weight_OI, importance_I, BLOCK, CODES, _SPANS, _TRIALS)
    return join_blocks(step_OG, code_OGS.view(np.uint8))
