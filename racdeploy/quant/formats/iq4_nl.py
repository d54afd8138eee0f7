"""IQ4_NL: 32 codes of 16 uneven values, none of them zero, and a half-precision scale."""

from functools import partial

from racdeploy.quant import ggml
from racdeploy.storage.ggml_types import GGML_TYPES

FORMATS = ("gguf",)
GGML_TYPE = GGML_TYPES["iq4_nl"].number
BITS = GGML_TYPES["iq4_nl"].bits
BLOCK = GGML_TYPES["iq4_nl"].block_weights
PRESERVES_ZERO = False

quantize = partial(ggml.quantize, GGML_TYPE)
dequantize = partial(ggml.dequantize, GGML_TYPE)
