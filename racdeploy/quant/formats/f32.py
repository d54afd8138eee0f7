"""F32: IEEE single precision, stored unchanged."""

from racdeploy.quant import floats, make_codec, read_ggml_type

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp32"
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("f32")
PRESERVES_ZERO = True

quantize, dequantize = make_codec(floats, "<f4")
