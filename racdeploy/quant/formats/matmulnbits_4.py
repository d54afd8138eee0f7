"""MatMulNBits with 4 bits: 32 weights share a scale; the middle code, 8, is zero."""

from racdeploy.quant import matmulnbits

FORMATS = ("onnx",)
BLOCK_SIZE = matmulnbits.BLOCK_SIZE
JS_DTYPE = "q4"
CODE_BITS = 4
ZERO_POINTS = False
BITS = 4.5
PRESERVES_ZERO = True
blocks, quantize, dequantize, GRID = matmulnbits.make_members(CODE_BITS)
