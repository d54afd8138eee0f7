"""BF16: the upper half of a float32, rounded to nearest even; importance has no effect."""

from racdeploy.quant import make_ggml_members, numpy_ggml

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("bf16", numpy_ggml)
PRESERVES_ZERO = True
