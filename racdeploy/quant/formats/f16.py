"""F16: IEEE half precision, rounded to nearest even; exporters refuse weights beyond 65504."""

from functools import partial

from racdeploy.quant import floats, read_ggml_type

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp16"
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("f16")
PRESERVES_ZERO = True

quantize = partial(floats.quantize, "<f2")
dequantize = partial(floats.dequantize, "<f2")
