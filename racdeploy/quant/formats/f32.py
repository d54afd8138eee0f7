"""F32: IEEE single precision, stored unchanged."""

from functools import partial

from racdeploy.quant import floats, read_ggml_type

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp32"
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("f32")
PRESERVES_ZERO = True

quantize = partial(floats.quantize, "<f4")
dequantize = partial(floats.dequantize, "<f4")
