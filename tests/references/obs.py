"""A slow textbook optimal brain surgeon: one explicit inverse per column, float64, numpy.

Pruning column j of a row w changes the columns behind it by -w_j / [H⁻¹]_jj · [H⁻¹]_j: where H is
the Hessian of the columns not yet fixed (Hassibi and Stork 1993, applied in column order as
SparseGPT does).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def prune(
    weight_OI: Array,
    hessian_II: Array,
    choose_keep: Callable[[Array, int, int], NDArray[np.bool_]],
    group: int,
) -> tuple[Array, NDArray[np.bool_]]:
    """Return pruned weights and the mask.

    Args:
        weight_OI: dense weights.
        hessian_II: damped Hessian.
        choose_keep: from the scores of one group of columns, its first column, and zeros so far,
            the mask.
        group: columns whose mask is chosen together.
    """
    weight_OI = weight_OI.copy()
    keep_OI = np.ones(weight_OI.shape, dtype=bool)
    inverses = [np.linalg.inv(hessian_II[j:, j:]) for j in range(len(hessian_II))]
    for column, inverse in enumerate(inverses):
        if column % group == 0:
            last = min(column + group, len(hessian_II))
            diagonal = np.array([inverses[j][0, 0] for j in range(column, last)])
            score = weight_OI[:, column:last] ** 2 / diagonal
            keep_OI[:, column:last] = choose_keep(score, column, int((~keep_OI).sum()))
        error_O = weight_OI[:, column] * ~keep_OI[:, column] / inverse[0, 0]
        weight_OI[:, column:] -= np.outer(error_O, inverse[0])
    return weight_OI * keep_OI, keep_OI


def wanda_keep(
    weight_OI: Array, norm_I: Array, sparsity: float | None, kept_of: tuple[int, int] | None
) -> NDArray[np.bool_]:
    """Return Wanda's mask: lowest |weight| times input norm go, per row or per group of M (arXiv
    2306.11695).
    """
    score = np.abs(weight_OI) * norm_I
    keep = np.ones(score.shape, dtype=bool)
    for row, values in enumerate(score):
        if kept_of:
            kept, of = kept_of
            for start in range(0, len(values), of):
                keep[row, start + np.argsort(values[start : start + of])[: of - kept]] = False
        else:
            assert sparsity is not None
            keep[row, np.argsort(values)[: round(sparsity * len(values))]] = False
    return keep
