"""MatMulNBits with 4 bits: 32 weights share a scale; the middle code, 8, is zero."""

from functools import partial

from racdeploy.quant import Quant
from racdeploy.quant.matmulnbits import (
    MatMulNBitsCodec,
    make_symmetric_grid,
    quantize_symmetric,
)

QUANT = Quant(
    codec=MatMulNBitsCodec(code_bits=4, make_blocks=partial(quantize_symmetric, bits=4)),
    preserves_zero=True,
    grid=make_symmetric_grid(4),
    js_dtype="q4",
)
