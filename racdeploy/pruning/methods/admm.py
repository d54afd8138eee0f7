"""ADMM: search mask and weights of a linear together.

Minimizes tr((W − T) H (W − T)ᵀ) subject to W = D, where D has the wanted zeros and H is scaled to a
unit diagonal. The penalty grows until the mask settles. Source: ALPS (arXiv 2406.07831), algorithm
1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern
from racdeploy.recipe import Pruning

# Hessian, factor, scaled Hessian, eigenvectors, LAPACK's workspace; 7 arrays beside the walk's.
MATRICES, COPIES = 6, 14
MAX_ITERATIONS, CHECK_EVERY, INITIAL_PENALTY = 300, 3, 0.1
# Share of the mask that changed → factor of the penalty: it grows slower as the mask settles.
PENALTY_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def prune(
    weight_OI: Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Prune one linear; an iteration costs two products with an I × I matrix."""
    target_OI = weight_OI * hessian.scale_I
    values_I, vectors_II = hessian.eigen
    pull_OI = target_OI @ hessian.scaled_II

    sparse_OI = target_OI.clone()
    dual_OI = torch.zeros_like(target_OI)
    penalty = INITIAL_PENALTY
    keep_OI = checked_OI = torch.ones_like(target_OI, dtype=torch.bool)

    for iteration in range(1, MAX_ITERATIONS + 1):
        # Best dense weights, pulled towards the sparse ones: W = right (H + penalty)⁻¹.
        right_OI = (pull_OI - dual_OI).add_(sparse_OI, alpha=penalty)
        solved_OI = (right_OI @ vectors_II) / (values_I + penalty)
        free_OI = solved_OI @ vectors_II.T

        # Nearest weights with the wanted zeros, and the dual update for the gap between the two.
        sparse_OI = torch.add(free_OI, dual_OI, alpha=1 / penalty)
        keep_OI = pattern.keep(sparse_OI.abs())
        sparse_OI *= keep_OI
        dual_OI.add_(free_OI.sub_(sparse_OI), alpha=penalty)

        if iteration % CHECK_EVERY == 0:
            changed = float((keep_OI != checked_OI).sum() / keep_OI.sum().clamp_min(1))
            if changed == 0:
                break

            checked_OI = keep_OI
            penalty *= next(factor for share, factor in PENALTY_GROWTH if changed > share)

    return PrunedWeights(sparse_OI / hessian.scale_I, keep_OI)
