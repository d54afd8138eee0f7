"""F16: IEEE half precision, rounded to nearest even; exporters refuse weights beyond 65504."""

from racdeploy.quant import floats, make_codec, read_ggml_type

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp16"
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("f16")
PRESERVES_ZERO = True

quantize, dequantize = make_codec(floats, "<f2")
