"""BF16: the upper half of a float32, rounded to nearest even; importance has no effect."""

from functools import partial

from racdeploy.quant import numpy_ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("bf16")
PRESERVES_ZERO = True

quantize = partial(numpy_ggml.quantize, GGML_TYPE)
dequantize = partial(numpy_ggml.dequantize, GGML_TYPE)
