"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import join_blocks, numpy_ggml, pair_nibbles, read_leading_scales, search
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["q4_0"].number
BITS = GGML_TYPES["q4_0"].bits
BLOCK = GGML_TYPES["q4_0"].block_weights
CODES = (-8, 7)
PRESERVES_ZERO = True
_SPANS = (0.76, 1.16)
_TRIALS = 8

dequantize = partial(numpy_ggml.dequantize, GGML_TYPE)
steps = partial(read_leading_scales, block_bytes=GGML_TYPES["q4_0"].block_bytes)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows: ggml's, bit for bit, or with scales that suit an importance."""
    if importance_I is None:
        return numpy_ggml.quantize(GGML_TYPE, weight_OI)

    step_OG, code_OGS = search.choose_codes(weight_OI, importance_I, BLOCK, CODES, _SPANS, _TRIALS)
    return join_blocks(step_OG, pair_nibbles((code_OGS + 8).view(np.uint8)))
