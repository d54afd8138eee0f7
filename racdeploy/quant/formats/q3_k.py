"""Q3_K: 256 signed 3-bit codes, a 6-bit scale for each 16 of them, one half-precision scale."""

from racdeploy.quant import ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK = read_ggml_type("q3_k")
PRESERVES_ZERO = True

quantize, dequantize = ggml.make_codec(GGML_TYPE)
