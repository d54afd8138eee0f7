"""MatMulNBits with 4 bits, a zero point for each 32 weights, and scales chosen by search, as K-quants do.

Every block tries narrower and wider ranges, solves for the scale on the codes that each gives, and keeps the one with
the least error, weighted by magnitude. The zero point is a whole code, so zeros stay zeros.
Source: ``make_qkx2_quants`` in ggml-quants.c, with the minimum of a block held to a multiple of its scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import matmulnbits
from racdeploy.quant.matmulnbits import Blocks

FORMATS = ("onnx",)
BITS = 4.625
BLOCK = 2 * matmulnbits.BLOCK  # two zero points share a byte
PRESERVES_ZERO = True
_MOST = np.float32(15)
_STEPS = 0.1 * np.arange(-10, 11, dtype=np.float32)
_SLAB_BLOCKS = 65_536


def quantize(weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return packed rows."""
    O, I = weight_OI.shape
    weight_BS = weight_OI.reshape(-1, matmulnbits.BLOCK)
    chosen = [
        _search(weight_BS[start : start + _SLAB_BLOCKS])
        for start in range(0, len(weight_BS), _SLAB_BLOCKS)
    ]
    code_BS, scale_B, zero_B = (np.concatenate(part) for part in zip(*chosen, strict=True))
    return Blocks(4, code_BS.reshape(O, I), scale_B.reshape(O, -1), zero_B.reshape(O, -1)).packed()


def dequantize(packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weights."""
    return blocks(packed_OP, I).weights()


def blocks(packed_OP: NDArray[np.uint8], I: int) -> Blocks:
    """Return what the operator takes."""
    return Blocks.read(packed_OP, I, 4, zero_points=True)


def _search(
    weight_BS: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.uint8]]:
    """Return code_BS, scale_B and zero_B."""
    low_B = np.minimum(weight_BS.min(axis=1), 0)
    width_B = np.maximum(weight_BS.max(axis=1), 0) - low_B
    importance_BS = np.abs(weight_BS) + np.sqrt(np.square(weight_BS).mean(axis=1, keepdims=True))
    best_B = np.full(len(weight_BS), np.inf, dtype=np.float32)
    scale_B, zero_B = (
        np.zeros(len(weight_BS), dtype=np.float16),
        np.zeros(len(weight_BS), dtype=np.float32),
    )
    for step in _STEPS:
        inverse_B = np.divide(_MOST + step, width_B, out=np.zeros_like(width_B), where=width_B > 0)
        at_B = np.clip(np.rint(-low_B * inverse_B), 0, _MOST)
        level_BS = (
            np.clip(np.rint(weight_BS * inverse_B[:, None]) + at_B[:, None], 0, _MOST)
            - at_B[:, None]
        )
        found_B = _fit(weight_BS, level_BS, importance_BS)
        level_BS = _levels(weight_BS, found_B, at_B)
        error_BS = weight_BS - level_BS * found_B.astype(np.float32)[:, None]
        error_B = np.einsum("bs,bs,bs->b", error_BS, error_BS, importance_BS)
        better_B = error_B < best_B
        best_B = np.where(better_B, error_B, best_B)
        scale_B, zero_B = np.where(better_B, found_B, scale_B), np.where(better_B, at_B, zero_B)
    code_BS = _levels(weight_BS, scale_B, zero_B) + zero_B[:, None]
    return code_BS.astype(np.uint8), scale_B, zero_B.astype(np.uint8)


def _fit(
    weight_BS: NDArray[np.float32],
    level_BS: NDArray[np.float32],
    importance_BS: NDArray[np.float32],
) -> NDArray[np.float16]:
    """Return the scale with the least weighted squared error on those levels, in half precision."""
    product_B = np.einsum("bs,bs,bs->b", weight_BS, level_BS, importance_BS)
    square_B = np.einsum("bs,bs,bs->b", level_BS, level_BS, importance_BS)
    scale_B = np.divide(product_B, square_B, out=np.zeros_like(product_B), where=square_B > 0)
    return np.asarray(scale_B, dtype=np.float16)


def _levels(
    weight_BS: NDArray[np.float32], scale_B: NDArray[np.float16], zero_B: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the nearest whole multiples of a scale that the codes round a zero point can express."""
    wide_B = scale_B.astype(np.float32)
    inverse_B = np.divide(np.float32(1), wide_B, out=np.zeros_like(wide_B), where=wide_B != 0)
    level_BS = np.rint(weight_BS * inverse_B[:, None])
    return np.asarray(np.clip(level_BS, -zero_B[:, None], _MOST - zero_B[:, None]))
