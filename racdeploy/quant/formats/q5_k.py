"""Q5_K: 256 unsigned 5-bit codes, a 6-bit scale and minimum for each 32; the minimum moves zero."""

from racdeploy.quant import ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q5_k")
PRESERVES_ZERO = False

quantize, dequantize = ggml.make_codec(GGML_TYPE)
