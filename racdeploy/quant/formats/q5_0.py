"""Q5_0: 32 signed 5-bit codes and a half-precision scale; code 16 is zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import numpy_ggml, read_ggml_type


def _pack(code_OGS: NDArray[np.int8]) -> NDArray[np.uint8]:
    stored_OGS = (code_OGS + 16).view(np.uint8)
    high_OG4 = np.packbits(stored_OGS >> np.uint8(4), axis=-1, bitorder="little")
    low_OGP = numpy_ggml.pack_nibbles(stored_OGS & np.uint8(15))
    return np.concatenate([high_OG4, low_OGP], axis=-1)


FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q5_0")
CODE_RANGE = (-16, 15)
GROUP_SIZE, STEP_CODE_RANGE = BLOCK_SIZE, (1, 1)
PRESERVES_ZERO = True
_blocks = numpy_ggml.ScaleBlockCodec("q5_0", CODE_RANGE, _pack, scale_range=(0.95, 1.2), trials=8)

quantize, dequantize = _blocks.quantize, _blocks.dequantize
steps = scales = _blocks.steps
