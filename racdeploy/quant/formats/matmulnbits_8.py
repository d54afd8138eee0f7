"""MatMulNBits with 8 bits: 32 weights share a scale; the middle code, 128, is zero."""

from functools import partial

from racdeploy.quant import matmulnbits

FORMATS = ("onnx",)
BLOCK_SIZE = matmulnbits.BLOCK_SIZE
JS_DTYPE = "q8"
CODE_BITS = 8
ZERO_POINTS = False
BITS = 8.5
PRESERVES_ZERO = True

blocks = partial(matmulnbits.MatMulNBitsBlocks.read, bits=CODE_BITS)
quantize = partial(matmulnbits.quantize, bits=CODE_BITS)
dequantize = partial(matmulnbits.dequantize, bits=CODE_BITS)
GRID = matmulnbits.make_grid(CODE_BITS)
