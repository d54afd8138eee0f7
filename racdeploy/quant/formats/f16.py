"""F16: IEEE half precision, to nearest even; whoever writes a file refuses weights beyond 65504."""

from functools import partial

from racdeploy.quant import floats, read_ggml_type

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp16"
GGML_TYPE, BITS, BLOCK = read_ggml_type("f16")
PRESERVES_ZERO = True

quantize = partial(floats.quantize, "<f2")
dequantize = partial(floats.dequantize, "<f2")
