"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates, column by column.

Source: arXiv 2301.00774, algorithm 1. Two differences to the authors' code: the number of pruned weights is exact
(theirs takes one too many per column block), and a Hessian that does not factor raises the damping in stated steps
and reports it, or fails.
"""

from __future__ import annotations

import torch

from racdeploy.errors import EnvironmentFailure
from racdeploy.prune.methods import Pruned
from racdeploy.prune.patterns import Pattern
from racdeploy.recipe import Pruning

DAMPING_STEP, DAMPING_STEPS = 10.0, 3


def prune(weight_OI: torch.Tensor, hessian_II: torch.Tensor, pattern: Pattern, settings: Pruning) -> Pruned:
    """Prune one linear and spread each error over the columns still to come.

    Args:
        weight_OI: float32; overwritten.
        hessian_II: mean of x xᵀ, float32.
        pattern: which counts of zeros are wanted.
        settings: damping and column_block.

    Raises:
        EnvironmentFailure: the Hessian does not factor even with 1000 times the damping.
    """
    I = weight_OI.shape[1]
    dead_I = hessian_II.diagonal() == 0
    weight_OI[:, dead_I] = 0
    factor_II, damping = inverse_factor(hessian_II, settings.damping)
    keep_OI = torch.ones_like(weight_OI, dtype=torch.bool)
    width = _slice_width(settings.column_block, pattern.group(settings.column_block), I)
    for start in range(0, I, width):
        stop = min(start + width, I)
        error_OC = _prune_slice(weight_OI, keep_OI, factor_II, pattern, start, stop, settings.column_block)
        weight_OI[:, stop:] -= error_OC @ factor_II[start:stop, stop:]
    return Pruned(weight_OI, keep_OI, damping)


def inverse_factor(hessian_II: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor U of H⁻¹ = Uᵀ U, and the damping that made it possible.

    Inputs that were never active get a unit diagonal: their weights are zero and stay so.
    """
    diagonal_I = hessian_II.diagonal()
    mean = diagonal_I.mean()
    for step in range(DAMPING_STEPS + 1):
        share = damping * DAMPING_STEP**step
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(share * mean)
        damped_II.diagonal()[diagonal_I == 0] = 1.0
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if failed:
            continue
        factor_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed:
            return factor_II, share
    raise EnvironmentFailure(
        f"the Hessian does not factor, even with damping {damping * DAMPING_STEP**DAMPING_STEPS:g}",
        remedy="collect more traces, or raise prune.damping in the recipe",
    )


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
            keep_OI[:, column:last] = pattern.keep(score_OC, pruned_before, start * len(weight_OI))
        kept_O = weight_OI[:, column] * keep_OI[:, column]
        error_O = (weight_OI[:, column] - kept_O) / factor_II[column, column]
        weight_OI[:, column:stop] -= torch.outer(error_O, factor_II[column, column:stop])
        weight_OI[:, column] = kept_O
        error_OC[:, column - start] = error_O
    return error_OC
