"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

import numpy as np

from racdeploy.quant import numpy_ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK = read_ggml_type("q4_0")
CODES = (-8, 7)
GROUP_SIZE, STEP_CODES = BLOCK, (1, 1)
PRESERVES_ZERO = True
_blocks = numpy_ggml.ScaledCodes(
    "q4_0",
    CODES,
    pack=lambda code_OGS: numpy_ggml.pair_nibbles((code_OGS + 8).view(np.uint8)),
    spans=(0.76, 1.16),
    trials=8,
)

quantize, dequantize = _blocks.quantize, _blocks.dequantize
steps = scales = _blocks.steps
