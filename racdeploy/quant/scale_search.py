"""Search the scale of every quant block that minimizes the importance-weighted error.

Minimizes Σ w (x − step · code)² over the scale, where w is the importance of the input and x the
weight. Several scales are tried: each gives codes, to which the scale is fitted by least squares.
The best is rounded to half precision and compared with ggml's own scale, so no block is worse than
ggml's.
Source: ``make_qx_quants`` in ggml-quants.c, with finer spans, and an exact comparison at the end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant.grid import Floats

_CHUNK_WEIGHTS = 65_536  # at a time: long rows for numpy, and five arrays fit into the cache


def search_scales(
    weight_OI: Floats,
    importance_I: Floats,
    block: int,
    codes: tuple[int, int],
    spans: tuple[float, float],
    trials: int,
) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Return step_OG, the scale of every block, and code_OGS, the code of every weight.

    Args:
        importance_I: weight of each input's squared error; above 0.
        spans: smallest and largest scale to try, as a share of the one that gives the largest
            weight an extreme code. A smaller scale clips that weight; a larger one changes every
            code, from which 8-bit formats gain.
        trials: number of scales, evenly spaced.
    """
    O, I = weight_OI.shape
    G = I // block
    assert (importance_I > 0).all(), "importance must be above zero"

    span_N = np.linspace(*spans, trials, dtype=np.float32)

    # Transposed: a block is a column, so that sums over blocks add whole rows. G is a chunk's.
    rows = max(1, _CHUNK_WEIGHTS // I)
    importance_GS = np.tile(importance_I.astype(np.float32).reshape(G, block), (rows, 1))
    importance_SG = np.ascontiguousarray(importance_GS.T)

    steps = []
    code_chunks = []

    for start in range(0, O, rows):
        weight_GS = weight_OI[start : start + rows].reshape(-1, block)
        weight_SG = np.ascontiguousarray(weight_GS.T)
        step_G, code_SG = _search(weight_SG, importance_SG[:, : weight_SG.shape[1]], codes, span_N)

        steps.append(step_G)
        code_chunks.append(code_SG.T.astype(np.int8))

    code_GS = np.concatenate(code_chunks)
    step_OG = np.concatenate(steps).reshape(O, G)
    return step_OG, code_GS.reshape(O, G, block)


def _search(
    weight_SG: Floats,
    importance_SG: Floats,
    codes: tuple[int, int],
    span_N: Floats,
) -> tuple[NDArray[np.float16], Floats]:
    """Return the half-precision scales and the codes of least error, never worse than ggml's."""
    index_1G = np.abs(weight_SG).argmax(0)[None]
    extreme_G = np.take_along_axis(weight_SG, index_1G, 0)[0]
    widest_G: Floats = extreme_G / np.float32(codes[0])  # ggml's scale

    step_G = _fit_scales(weight_SG, importance_SG, widest_G, codes, span_N)

    # Rounded to half precision, the fitted scale may be worse than ggml's.
    result_G, code_SG, error_G = _round(weight_SG, importance_SG, step_G, codes)
    plain_G, plain_SG, plain_error_G = _round(weight_SG, importance_SG, widest_G, codes)

    worse_G = ~(error_G <= plain_error_G)
    np.copyto(result_G, plain_G, where=worse_G)
    np.copyto(code_SG, plain_SG, where=worse_G)

    return result_G, code_SG


def _fit_scales(
    weight_SG: Floats,
    importance_SG: Floats,
    widest_G: Floats,
    codes: tuple[int, int],
    span_N: Floats,
) -> Floats:
    """Return the best least-squares scale of each block, over the codes of all tried scales.

    For fixed codes it is match / energy, with match = Σ w x code and energy = Σ w code², and it
    reduces the error Σ w x² of all-zero codes by match² / energy.
    """
    weighted_SG = importance_SG * weight_SG
    code_SG = np.empty_like(weight_SG)
    product_SG = np.empty_like(weight_SG)

    best_G = np.zeros_like(widest_G)
    step_G = widest_G.copy()

    for span in span_N:
        _round_to_codes(weight_SG, widest_G * span, codes, code_SG)

        match_G = np.multiply(code_SG, weighted_SG, out=product_SG).sum(0)
        np.multiply(code_SG, code_SG, out=product_SG)
        energy_G = np.multiply(product_SG, importance_SG, out=product_SG).sum(0)
        energy_G[energy_G == 0] = 1

        fitted_G = match_G / energy_G
        gain_G = fitted_G * match_G
        better_G = gain_G > best_G
        np.copyto(best_G, gain_G, where=better_G)
        np.copyto(step_G, fitted_G, where=better_G)

    return step_G


def _round(
    weight_SG: Floats,
    importance_SG: Floats,
    step_G: Floats,
    codes: tuple[int, int],
) -> tuple[NDArray[np.float16], Floats, Floats]:
    """Return half-precision scales, their nearest codes, and each block's weighted error."""
    with np.errstate(over="ignore"):  # the exporter refuses infinite scales
        half_G = step_G.astype(np.float16)

    rounded_G = half_G.astype(np.float32)
    code_SG = _round_to_codes(weight_SG, rounded_G, codes, np.empty_like(weight_SG))

    with np.errstate(invalid="ignore"):
        error_SG = weight_SG - code_SG * rounded_G
        error_SG *= error_SG
        error_SG *= importance_SG

    return half_G, code_SG, error_SG.sum(0)


def _round_to_codes(
    weight_SG: Floats,
    step_G: Floats,
    codes: tuple[int, int],
    out_SG: Floats,
) -> Floats:
    with np.errstate(divide="ignore", over="ignore"):
        inverse_G = np.where(step_G == 0, np.float32(0), np.float32(1) / step_G)
    np.multiply(weight_SG, inverse_G, out=out_SG)
    np.rint(out_SG, out=out_SG)
    return np.clip(out_SG, *map(np.float32, codes), out=out_SG)
