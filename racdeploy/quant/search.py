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

_CHUNK_WEIGHTS = 65_536  # long rows of blocks for numpy, and five arrays of them near a core


def choose_codes(
    weight_OI: NDArray[np.float32],
    importance_I: NDArray[np.float32],
    block: int,
    codes: tuple[int, int],
    spans: tuple[float, float],
    trials: int,
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
        trials: scales to try, evenly over the spans.
    """
    O, I = weight_OI.shape
    assert (importance_I > 0).all(), "importance must be above zero"
    step_OB = np.empty((O, I // block), dtype=np.float16)
    code_OI = np.empty((O, I), dtype=np.int8)
    rows = max(1, _CHUNK_WEIGHTS // I)
    importance_KB = _turned(np.tile(importance_I.astype(np.float32).reshape(-1, block), (rows, 1)))
    for start in range(0, O, rows):
        weight_KB = _turned(weight_OI[start : start + rows].reshape(-1, block))
        step_B, code_KB = _choose(
            weight_KB,
            importance_KB[:, : weight_KB.shape[1]],
            codes,
            np.linspace(*spans, trials, dtype=np.float32),
        )
        step_OB[start : start + rows] = step_B.reshape(-1, I // block)
        code_OI[start : start + rows] = code_KB.T.reshape(-1, I)
    return step_OB, code_OI


def _turned(values_BK: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the weights of a block one below the other: sums over a block then add whole rows of blocks."""
    return np.ascontiguousarray(values_BK.T)


def _choose(
    weight_KB: NDArray[np.float32],
    importance_KB: NDArray[np.float32],
    codes: tuple[int, int],
    span_N: NDArray[np.float32],
) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
    extreme_1B = np.take_along_axis(weight_KB, np.abs(weight_KB).argmax(0)[None], 0)
    widest_B: NDArray[np.float32] = extreme_1B[0] / np.float32(codes[0])
    weighted_KB = importance_KB * weight_KB
    code_KB, product_KB = np.empty_like(weight_KB), np.empty_like(weight_KB)
    best_B, step_B = np.zeros_like(widest_B), widest_B.copy()
    for span in span_N:
        _codes(weight_KB, widest_B * span, codes, code_KB)
        match_B = np.multiply(code_KB, weighted_KB, out=product_KB).sum(0)
        np.multiply(code_KB, code_KB, out=product_KB)
        energy_B = np.multiply(product_KB, importance_KB, out=product_KB).sum(0)
        energy_B[energy_B == 0] = 1
        fitted_B = match_B / energy_B
        better_B = fitted_B * match_B > best_B
        np.copyto(best_B, fitted_B * match_B, where=better_B)
        np.copyto(step_B, fitted_B, where=better_B)
    found_B, found_KB, error_B = _rounded(weight_KB, importance_KB, step_B, codes)
    plain_B, plain_KB, plain_error_B = _rounded(weight_KB, importance_KB, widest_B, codes)
    worse_B = ~(error_B <= plain_error_B)
    np.copyto(found_B, plain_B, where=worse_B)
    np.copyto(found_KB, plain_KB, where=worse_B)
    return found_B, found_KB


def _rounded(
    weight_KB: NDArray[np.float32],
    importance_KB: NDArray[np.float32],
    step_B: NDArray[np.float32],
    codes: tuple[int, int],
) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]:
    """Return scales in half precision, the nearest codes at those, and the weighted error of each block."""
    with np.errstate(over="ignore"):  # an infinite scale is refused by whoever writes the file
        half_B = step_B.astype(np.float16)
    rounded_B = half_B.astype(np.float32)
    code_KB = _codes(weight_KB, rounded_B, codes, np.empty_like(weight_KB))
    with np.errstate(invalid="ignore"):
        error_KB = weight_KB - code_KB * rounded_B
        error_KB *= error_KB
        error_KB *= importance_KB
    return half_B, code_KB, error_KB.sum(0)


def _codes(
    weight_KB: NDArray[np.float32],
    step_B: NDArray[np.float32],
    codes: tuple[int, int],
    out_KB: NDArray[np.float32],
) -> NDArray[np.float32]:
    with np.errstate(divide="ignore", over="ignore"):
        inverse_B = np.where(step_B == 0, np.float32(0), np.float32(1) / step_B)
    np.multiply(weight_KB, inverse_B, out=out_KB)
    np.rint(out_KB, out=out_KB)
    return np.clip(out_KB, *map(np.float32, codes), out=out_KB)
