"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates, column by column.

Source: arXiv 2301.00774, algorithm 1; but exact in number (theirs: one too many per column block).
"""

from __future__ import annotations

import torch

from racdeploy.prune.methods import Pruned
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.weights.patterns import Pattern
from racdeploy.recipe import Pruning


def prune(weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning) -> Pruned:
    """Prune one linear and spread each error over the columns still to come."""
    I = weight_OI.shape[1]
    factor_II = hessian.inverse_factor_II
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)

    # Masks are chosen for whole groups: the slice is as many of them as fit into the column block.
    group = pattern.group(settings.column_block)
    width = min(max(settings.column_block // group, 1) * group, I)

    for start in range(0, I, width):
        stop = min(start + width, I)
        error_OC = _prune_slice(weight_OI, keep_OI, factor_II, pattern, group, start, stop)
        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]

    return Pruned(weight_OI, keep_OI)


def _prune_slice(
    weight_OI: torch.Tensor,
    keep_OI: torch.Tensor,
    factor_II: torch.Tensor,
    pattern: Pattern,
    group: int,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Prune columns start to stop in place and return their scaled errors."""
    error_OC = torch.zeros_like(weight_OI[:, start:stop])
    diagonal_I = factor_II.diagonal()
    pruned_before = int((~keep_OI[:, :start]).sum())

    for column in range(start, stop):  # absolute; the local index is column - start
        # A weight's cost: its square over that of the factor's diagonal; columns before are fixed.
        if (column - start) % group == 0:
            last = min(column + group, stop)
            score_OC = (weight_OI[:, column:last] / diagonal_I[column:last]).square()
            keep_OI[:, column:last] = pattern.keep(score_OC, column, pruned_before)

        # What the column loses is made good in the columns still to come: of this slice at once …
        kept_O = weight_OI[:, column] * keep_OI[:, column]
        error_O = (weight_OI[:, column] - kept_O) / diagonal_I[column]
        weight_OI[:, column:stop] -= torch.outer(error_O, factor_II[column, column:stop])
        weight_OI[:, column] = kept_O
        error_OC[:, column - start] = error_O  # … and of the others after the slice, in one product

    return error_OC
