"""Q4_K: 256 unsigned 4-bit codes, a 6-bit scale and minimum for each 32; the minimum moves zero."""

from functools import partial

from racdeploy.quant import ggml
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["q4_k"].number
BITS = GGML_TYPES["q4_k"].bits
BLOCK = GGML_TYPES["q4_k"].block_weights
PRESERVES_ZERO = False

quantize = partial(ggml.quantize, GGML_TYPE)
dequantize = partial(ggml.dequantize, GGML_TYPE)
