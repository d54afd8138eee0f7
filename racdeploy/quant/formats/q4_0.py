"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

import numpy as np

from racdeploy.quant import numpy_ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q4_0")
CODE_RANGE = (-8, 7)
GROUP_SIZE, STEP_CODE_RANGE = BLOCK_SIZE, (1, 1)
PRESERVES_ZERO = True
_blocks = numpy_ggml.ScaleBlockCodec(
    "q4_0",
    CODE_RANGE,
    pack=lambda code_OGS: numpy_ggml.pack_nibbles((code_OGS + 8).view(np.uint8)),
    scale_range=(0.76, 1.16),
    trials=8,
)

quantize, dequantize = _blocks.quantize, _blocks.dequantize
steps = scales = _blocks.steps
