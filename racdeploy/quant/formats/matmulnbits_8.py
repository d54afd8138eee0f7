"""MatMulNBits with 8 bits: 32 weights share a scale; the middle code, 128, is zero."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import matmulnbits
from racdeploy.quant.matmulnbits import Blocks

FORMATS = ("onnx",)
BLOCK = matmulnbits.BLOCK
JS_DTYPE = "q8"
CODE_BITS = 8
ZERO_POINTS = False
BITS = 8.5
CODES = (-128, 127)
PRESERVES_ZERO = True

blocks = partial(Blocks.read, bits=8)
steps = partial(matmulnbits.read_scales, bits=8)


def quantize(weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return packed rows: at each scale the codes of onnxruntime's own quantizer."""
    return matmulnbits.choose_symmetric(weight_OI, 8).pack()


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    return blocks(packed_OP, I).weights()
