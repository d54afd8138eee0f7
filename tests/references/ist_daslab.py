"""SparseGPT and Wanda as their authors' code does them, float64, numpy, written anew from the
algorithms.

Source: arXiv 2301.00774, algorithm 1, and IST-DASLab/sparsegpt, ``fasterprune``; arXiv 2306.11695,
section 3, and locuslab/wanda, ``prune_wanda``. Masks here are True where a weight goes, as there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def sparsegpt(
    weight_OI: Array,
    hessian_II: Array,
    sparsity: float = 0.0,
    pruned_of: tuple[int, int] = (0, 0),
    column_block: int = 128,
    percdamp: float = 0.01,
    one_too_many: bool = True,
) -> tuple[Array, Mask]:
    """Return weights and mask.

    Args:
        weight_OI: dense weights.
        hessian_II: mean or sum of x xᵀ; a factor changes nothing.
        sparsity: share of weights that go in each column block, without ``pruned_of``.
        pruned_of: n weights go of each m.
        column_block: columns that are updated together.
        percdamp: damping as a share of the mean diagonal.
        one_too_many: their threshold is itself pruned, one weight more than asked in each column
            block.
    """
    W, H = weight_OI.copy(), hessian_II.copy()
    O, I = W.shape
    dead = np.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += percdamp * np.diag(H).mean() * np.eye(I)
    factor = cholesky(np.linalg.inv(H))
    gone = np.zeros((O, I), dtype=bool)
    count, of = pruned_of
    for start in range(0, I, column_block):
        stop = min(start + column_block, I)
        errors = np.zeros((O, stop - start))
        if not of:
            score = W[:, start:stop] ** 2 / np.diag(factor)[start:stop] ** 2
            last = int(score.size * sparsity) - (not one_too_many)
            gone[:, start:stop] = score <= np.sort(score, axis=None)[last]
        for column in range(start, stop):
            if of and column % of == 0:
                score = W[:, column : column + of] ** 2 / np.diag(factor)[column : column + of] ** 2
                lowest = np.argsort(score, axis=1)[:, :count]
                np.put_along_axis(gone[:, column : column + of], lowest, True, axis=1)
            errors[:, column - start] = W[:, column] * gone[:, column] / factor[column, column]
            W[:, column:stop] -= np.outer(errors[:, column - start], factor[column, column:stop])
            W[gone[:, column], column] = 0
        W[:, stop:] -= errors @ factor[start:stop, stop:]
    return W, gone


def wanda(
    weight_OI: Array, input_NI: Array, sparsity: float = 0.0, pruned_of: tuple[int, int] = (0, 0)
) -> Mask:
    """Return what goes: the lowest |weight| × root of the mean squared input, per output, or n of
    each m.
    """
    score = np.abs(weight_OI) * np.sqrt((input_NI**2).mean(0))
    gone = np.zeros(score.shape, dtype=bool)
    count, of = pruned_of
    if of:
        for start in range(0, score.shape[1], of):
            lowest = np.argsort(score[:, start : start + of], axis=1)[:, :count]
            np.put_along_axis(gone[:, start : start + of], lowest, True, axis=1)
    else:
        lowest = np.argsort(score, axis=1)[:, : int(score.shape[1] * sparsity)]
        np.put_along_axis(gone, lowest, True, axis=1)
    return gone
