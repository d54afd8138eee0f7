"""Choose the scale of every quant block for the weights that matter, not for the largest one alone.

Minimizes Σ w (x − step · code)² over the scale, where w is the importance of the input and x the weight: a weight that
is zero has the code zero at any scale, so a pruned block is fitted to what pruning kept. A scale is tried for each of
several spans, fitted to its codes by least squares, and rounded to half precision before the codes are taken; the scale
that ggml would choose takes part, so no block comes out worse than ggml's.
Source: ``make_qx_quants`` in ggml-quants.c, with finer spans, and an exact comparison at the end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_codes"]

_CHUNK_WEIGHTS = 32_768  # three arrays of them stay in a core's cache
_TRIALS = 16


def choose_codes(
    weight_OI: NDArray[np.float32],
    importance_I: NDArray[np.float32],
    block: int,
    codes: tuple[int, int],
    spans: tuple[float, float],
) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Return the scale of every block, step_OB, and the code of every weight, code_OI.

    Args:
        weight_OI: rows of whole blocks.
        importance_I: what the squared error of an input counts; above 0.
        block: weights that share a scale.
        codes: the lowest and the highest code.
        spans: the smallest and the largest scale to try, as shares of the one that stores the largest weight at the
            end of the codes. A smaller one clips that weight; a larger one moves every code, which is what 8 bits gain
            from.
    """
    O, I = weight_OI.shape
    assert (importance_I > 0).all(), "importance must be above zero"
    step_OB = np.empty((O, I // block), dtype=np.float16)
    code_OI = np.empty((O, I), dtype=np.int8)
    rows = max(1, _CHUNK_WEIGHTS // I)
    importance_BK = np.tile(importance_I.astype(np.float32).reshape(-1, block), (rows, 1))
    for start in range(0, O, rows):
        weight_BK = np.ascontiguousarray(weight_OI[start : start + rows]).reshape(-1, block)
        step_B, code_BK = _choose(weight_BK, importance_BK[: len(weight_BK)], codes, spans)
        step_OB[start : start + rows] = step_B.reshape(-1, I // block)
        code_OI[start : start + rows] = code_BK.reshape(-1, I)
    return step_OB, code_OI


def _choose(
    weight_BK: NDArray[np.float32],
    importance_BK: NDArray[np.float32],
    codes: tuple[int, int],
    spans: tuple[float, float],
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    extreme_B1 = np.take_along_axis(weight_BK, np.abs(weight_BK).argmax(1)[:, None], 1)
    widest_B: NDArray[np.float32] = extreme_B1[:, 0] / np.float32(codes[0])
    weighted_BK = importance_BK * weight_BK
    best_B, step_B = np.zeros_like(widest_B), widest_B.copy()
    for span in np.linspace(*spans, _TRIALS, dtype=np.float32):
        code_BK = _codes(weight_BK, widest_B * span, codes)
        match_B = np.einsum("bk,bk->b", code_BK, weighted_BK)
        code_BK *= code_BK
        energy_B = np.einsum("bk,bk->b", code_BK, importance_BK)
        energy_B[energy_B == 0] = 1
        fitted_B = match_B / energy_B
        better_B = fitted_B * match_B > best_B
        np.copyto(best_B, fitted_B * match_B, where=better_B)
        np.copyto(step_B, fitted_B, where=better_B)
    found_B, found_BK, error_B = _rounded(weight_BK, importance_BK, step_B, codes)
    plain_B, plain_BK, plain_error_B = _rounded(weight_BK, importance_BK, widest_B, codes)
    worse_B = ~(error_B <= plain_error_B)
    np.copyto(found_B, plain_B, where=worse_B)
    np.copyto(found_BK, plain_BK, where=worse_B[:, None])
    return found_B, found_BK


def _rounded(
    weight_BK: NDArray[np.float32],
    importance_BK: NDArray[np.float32],
    step_B: NDArray[np.float32],
    codes: tuple[int, int],
) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]:
    """Return scales in half precision, the nearest codes at those, and the weighted error of each block."""
    with np.errstate(over="ignore"):  # an infinite scale is refused by whoever writes the file
        half_B = step_B.astype(np.float16)
    rounded_B = half_B.astype(np.float32)
    code_BK = _codes(weight_BK, rounded_B, codes)
    with np.errstate(invalid="ignore"):
        error_BK = weight_BK - code_BK * rounded_B[:, None]
    return half_B, code_BK, np.einsum("bk,bk,bk->b", error_BK, error_BK, importance_BK)


def _codes(weight_BK: NDArray[np.float32], step_B: NDArray[np.float32], codes: tuple[int, int]) -> NDArray[np.float32]:
    with np.errstate(divide="ignore", over="ignore"):
        inverse_B = np.where(step_B == 0, np.float32(0), np.float32(1) / step_B)
    code_BK = weight_BK * inverse_B[:, None]
    np.rint(code_BK, out=code_BK)
    return np.clip(code_BK, *codes, out=code_BK)
