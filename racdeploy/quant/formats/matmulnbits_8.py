"""MatMulNBits with 8 bits: 32 weights share a scale; the middle code, 128, is zero."""

from functools import partial

from racdeploy.quant import Quant
from racdeploy.quant.matmulnbits import (
    MatMulNBitsCodec,
    make_symmetric_grid,
    quantize_symmetric,
)

QUANT = Quant(
    codec=MatMulNBitsCodec(code_bits=8, make_blocks=partial(quantize_symmetric, bits=8)),
    preserves_zero=True,
    grid=make_symmetric_grid(8),
    js_dtype="q8",
)
