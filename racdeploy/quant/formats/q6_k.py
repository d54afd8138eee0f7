"""Q6_K: 256 signed 6-bit codes, an 8-bit scale for each 16 of them, one half-precision scale."""

from racdeploy.quant import ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q6_k")
PRESERVES_ZERO = True

quantize, dequantize = ggml.make_codec(GGML_TYPE)
