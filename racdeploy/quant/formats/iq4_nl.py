"""IQ4_NL: 32 4-bit indices into 16 uneven values, none of them zero, and a half-precision scale."""

from racdeploy.quant import ggml, read_ggml_type

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("iq4_nl")
PRESERVES_ZERO = False

quantize, dequantize = ggml.make_codec(GGML_TYPE)
