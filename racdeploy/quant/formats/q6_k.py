"""Q6_K: 256 signed 6-bit codes, an 8-bit scale for each 16 of them, one half-precision scale."""

from functools import partial

from racdeploy.quant import ggml
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["q6_k"].number
BITS = GGML_TYPES["q6_k"].bits
BLOCK = GGML_TYPES["q6_k"].block_weights
PRESERVES_ZERO = True

quantize = partial(ggml.quantize, GGML_TYPE)
dequantize = partial(ggml.dequantize, GGML_TYPE)
