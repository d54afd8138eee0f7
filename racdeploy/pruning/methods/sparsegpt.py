"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates, column by column.

Source: arXiv 2301.00774, algorithm 1. The number of zeros is exact here; the reference code prunes
one weight too many per column block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern
from racdeploy.recipe import Pruning


def prune(
    weight_OI: Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Prune one linear, compensating each error in the later columns."""
    I = weight_OI.shape[1]
    factor_II = hessian.inverse_factor_II
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)

    # A mask is chosen for a whole group, so a slice has as many groups as fit the column block.
    group = pattern.group_width(settings.column_block)
    width = min(max(settings.column_block // group, 1) * group, I)

    for start in range(0, I, width):
        stop = min(start + width, I)

        error_OC = torch.zeros_like(weight_OI[:, start:stop])
        diagonal_I = factor_II.diagonal()
        pruned_before = int((~keep_OI[:, :start]).sum())

        for column in range(start, stop):  # absolute; the local index is column - start
            # Saliency of a weight: (w / U_cc)², given that earlier columns are fixed.
            if (column - start) % group == 0:
                last = min(column + group, stop)
                score_OC = (weight_OI[:, column:last] / diagonal_I[column:last]).square()
                keep_OI[:, column:last] = pattern.keep(score_OC, column, pruned_before)

            # Compensate the error in the later columns of this slice at once …
            kept_O = weight_OI[:, column] * keep_OI[:, column]
            error_O = (weight_OI[:, column] - kept_O) / diagonal_I[column]
            weight_OI[:, column:stop] -= torch.outer(error_O, factor_II[column, column:stop])
            weight_OI[:, column] = kept_O
            error_OC[:, column - start] = error_O  # … and in the columns after it by one product

        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]

    return PrunedWeights(weight_OI, keep_OI)
