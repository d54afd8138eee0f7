"""BF16: the upper half of a float32, rounded to nearest even; importance has no effect."""

from racdeploy.quant import make_codec, numpy_ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("bf16")
PRESERVES_ZERO = True

quantize, dequantize = make_codec(numpy_ggml, GGML_TYPE)
