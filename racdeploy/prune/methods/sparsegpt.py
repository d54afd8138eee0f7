"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates, column by column.

Source: arXiv 2301.00774, algorithm 1. One difference to the authors' code: the number of pruned weights is exact
(theirs takes one too many per column block).
"""

from __future__ import annotations

import torch

from racdeploy.prune.hessian import Hessian
from racdeploy.prune.methods import Pruned
from racdeploy.prune.patterns import Pattern
from racdeploy.recipe import Pruning


def prune(weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning) -> Pruned:
    """Prune one linear and spread each error over the columns still to come.

    Args:
        weight_OI: float32; overwritten.
        hessian: of the input.
        pattern: which counts of zeros are wanted.
        settings: column_block.
    """
    I = weight_OI.shape[1]
    factor_II = hessian.inverse_factor_II
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    width = _slice_width(settings.column_block, pattern.group(settings.column_block), I)
    for start in range(0, I, width):
        stop = min(start + width, I)
        error_OC = _prune_slice(
            weight_OI, keep_OI, factor_II, pattern, start, stop, settings.column_block
        )
        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]
    return Pruned(weight_OI, keep_OI)


def _slice_width(column_block: int, group: int, inputs: int) -> int:
    """Return the largest multiple of a mask group within the column block, at least one group."""
    return min(max(column_block // group, 1) * group, inputs)


def _prune_slice(
    weight_OI: torch.Tensor,
    keep_OI: torch.Tensor,
    factor_II: torch.Tensor,
    pattern: Pattern,
    start: int,
    stop: int,
    column_block: int,
) -> torch.Tensor:
    """Prune columns start to stop in place and return their scaled errors."""
    error_OC = torch.zeros_like(weight_OI[:, start:stop])
    group = pattern.group(column_block)
    pruned_before = int((~keep_OI[:, :start]).sum())
    for column in range(start, stop):
        if (column - start) % group == 0:
            last = min(column + group, stop)
            score_OC = (weight_OI[:, column:last] / factor_II.diagonal()[column:last]).square()
            keep_OI[:, column:last] = pattern.keep(score_OC, column, pruned_before)
        kept_O = weight_OI[:, column] * keep_OI[:, column]
        error_O = (weight_OI[:, column] - kept_O) / factor_II[column, column]
        weight_OI[:, column:stop] -= torch.outer(error_O, factor_II[column, column:stop])
        weight_OI[:, column] = kept_O
        error_OC[:, column - start] = error_O
    return error_OC
