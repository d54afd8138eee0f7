"""F16: IEEE half precision, rounded to nearest even; exporters refuse weights beyond 65504."""

from racdeploy.quant import floats, make_ggml_members

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp16"
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("f16", floats)
PRESERVES_ZERO = True
