"""MatMulNBits with 8 bits: 32 weights share a scale; the middle code, 128, is zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import matmulnbits
from racdeploy.quant.matmulnbits import Blocks, choose_symmetric

FORMATS = ("onnx",)
BLOCK = matmulnbits.BLOCK
BITS = 8.5
CODES = (-128, 127)
PRESERVES_ZERO = True


def quantize(weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return packed rows: at each scale the codes of onnxruntime's own quantizer."""
    return choose_symmetric(weight_OI, 8).packed()


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    return blocks(packed_OP, I).weights()


def blocks(packed_OP: NDArray[np.uint8], I: int) -> Blocks:
    """Return what the operator takes."""
    return Blocks.read(packed_OP, I, 8)


def steps(packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the scale of every block."""
    return blocks(packed_OP, round(8 * packed_OP.shape[1] / BITS)).scale_OG.astype(np.float32)
