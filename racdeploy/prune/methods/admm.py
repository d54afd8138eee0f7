"""ADMM: search mask and weights together, linear by linear, then solve on the mask found.

Minimizes tr((W − T) H (W − T)ᵀ) subject to W = D, D with the wanted zeros, H scaled to a unit
diagonal. The penalty grows until the mask settles. Source: ALPS (arXiv 2406.07831), algorithm 1.
"""

from __future__ import annotations

import torch

from racdeploy.prune.methods import Pruned
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.weights.patterns import Pattern
from racdeploy.recipe import Pruning

# Hessian, factor, both scaled and decomposed, LAPACK's own; 7 linears beside those of the walk.
MATRICES, COPIES = 6, 14
ROUNDS, LOOK_EVERY, FIRST_PENALTY = 300, 3, 0.1
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the mask that changed → penalty factor


def prune(weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning) -> Pruned:
    """Prune one linear; every step costs two products with an I × I matrix."""
    target_OI = weight_OI * hessian.scale_I
    values_I, vectors_II = hessian.eigen
    pull_OI = target_OI @ hessian.scaled_II

    sparse_OI = target_OI.clone()
    dual_OI = torch.zeros_like(target_OI)
    penalty = FIRST_PENALTY
    keep_OI = seen_OI = torch.ones_like(target_OI, dtype=torch.bool)

    for turn in range(1, ROUNDS + 1):
        # The best weights without zeros, drawn towards those with zeros: W = right (H + penalty)⁻¹.
        right_OI = (pull_OI - dual_OI).add_(sparse_OI, alpha=penalty)
        solved_OI = (right_OI @ vectors_II) / (values_I + penalty)
        free_OI = solved_OI @ vectors_II.T

        # The nearest weights with the wanted zeros, and the price of what is between the two.
        sparse_OI = torch.add(free_OI, dual_OI, alpha=1 / penalty)
        keep_OI = pattern.keep(sparse_OI.abs())
        sparse_OI *= keep_OI
        dual_OI.add_(free_OI.sub_(sparse_OI), alpha=penalty)

        if turn % LOOK_EVERY == 0:
            changed = float((keep_OI != seen_OI).sum() / keep_OI.sum().clamp_min(1))
            if changed == 0:
                break

            seen_OI = keep_OI
            penalty *= next(factor for share, factor in GROWTH if changed > share)

    return Pruned(sparse_OI / hessian.scale_I, keep_OI)
