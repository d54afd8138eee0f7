"""Q8_0: 32 signed 8-bit codes and a half-precision scale."""

import numpy as np

from racdeploy.quant import numpy_ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q8_0")
CODE_RANGE = (-127, 127)
GROUP_SIZE, STEP_CODE_RANGE = BLOCK_SIZE, (1, 1)
PRESERVES_ZERO = True
_blocks = numpy_ggml.ScaleBlockCodec(
    "q8_0",
    CODE_RANGE,
    pack=lambda code_OGS: code_OGS.view(np.uint8),
    scale_range=(1.0, 1.15),
    trials=16,
)

quantize, dequantize = _blocks.quantize, _blocks.dequantize
steps = scales = _blocks.steps
