"""MatMulNBits with 8 bits: 32 weights share a scale; the middle code, 128, is zero."""

from racdeploy.quant import matmulnbits

FORMATS = ("onnx",)
BLOCK_SIZE = matmulnbits.BLOCK_SIZE
JS_DTYPE = "q8"
CODE_BITS = 8
ZERO_POINTS = False
BITS = 8.5
PRESERVES_ZERO = True
blocks, quantize, dequantize, GRID = matmulnbits.make_members(CODE_BITS)
