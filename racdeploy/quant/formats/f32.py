"""F32: IEEE single precision, stored unchanged."""

from racdeploy.quant import floats, make_ggml_members

FORMATS = ("gguf", "onnx")
JS_DTYPE = "fp32"
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("f32", floats)
PRESERVES_ZERO = True
