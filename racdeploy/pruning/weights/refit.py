"""Refit: optimal values on a fixed mask, by conjugate gradients. Usable after any method.

Minimizes tr((W − T) H (W − T)ᵀ) over the kept weights, preconditioned with the diagonal.
Source: ALPS (arXiv 2406.07831), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from racdeploy import plugins
from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern, Unstructured
from racdeploy.recipe import Pruning

_TINY = 1e-30  # avoids 0 / 0 in rows that have converged


def prune_and_refit(
    weight_OI: Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Prune a copy of ``weight_OI`` by the recipe's method, and refit it if asked for steps."""
    if isinstance(pattern, Unstructured) and not pattern.sparsity:
        return PrunedWeights(weight_OI, torch.ones_like(weight_OI, dtype=torch.bool))

    method = plugins.load("prune_methods", settings.method)
    pruned: PrunedWeights = method.prune(weight_OI.clone(), hessian, pattern, settings)
    if not settings.refit_steps:
        return pruned
    return PrunedWeights(refit(pruned, weight_OI, hessian, settings.refit_steps), pruned.keep_OI)


def refit(pruned: PrunedWeights, target_OI: Tensor, hessian: Hessian, steps: int) -> Tensor:
    """Return weights on the mask of a pruned linear, whose error is at most the same."""
    weight_OI = pruned.weight_OI * pruned.keep_OI
    pull_OI = (target_OI - weight_OI) @ hessian.matrix_II
    conjugate_gradient(
        weight_OI, pull_OI, free_OI=pruned.keep_OI, H_II=hessian.matrix_II, steps=steps
    )
    return weight_OI


def conjugate_gradient(
    weight_OI: Tensor,
    pull_OI: Tensor,  # negative half gradient, (T − W) H; updated in place
    *,
    free_OI: Tensor,
    H_II: Tensor,
    steps: int,  # each costs a product with the Hessian
) -> None:
    """Take conjugate-gradient steps on the free weights, in place; others are fixed."""
    diagonal_I = H_II.diagonal()
    scaled_OI = (pull_OI / diagonal_I).mul_(free_OI)
    power_O1 = (pull_OI * scaled_OI).sum(1, keepdim=True)
    step_OI = scaled_OI

    for _ in range(steps):
        # Line search along the step; the same product also updates the gradient.
        product_OI = step_OI @ H_II
        curve_O1 = (step_OI * product_OI).sum(1, keepdim=True)
        length_O1 = power_O1 / curve_O1.clamp_min(_TINY)
        weight_OI += length_O1 * step_OI
        pull_OI -= product_OI.mul_(length_O1)

        # The next direction: downhill, and conjugate to the last one.
        scaled_OI = (pull_OI / diagonal_I).mul_(free_OI)
        next_O1 = (pull_OI * scaled_OI).sum(1, keepdim=True)
        step_OI = scaled_OI.add_(next_O1 / power_O1.clamp_min(_TINY) * step_OI)
        power_O1 = next_O1
