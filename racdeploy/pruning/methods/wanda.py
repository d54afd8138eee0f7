"""Wanda: zero the weights of each output with the smallest |weight| × input norm.

Source: arXiv 2306.11695, section 3. No compensation; ``prune.refit_steps`` adds it.
"""

from __future__ import annotations

from torch import Tensor

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern
from racdeploy.recipe import Pruning

MATRICES, COPIES = 1, 9  # no factor; two sorts with 64-bit indices


def prune(
    weight_OI: Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Zero the least important weights of every output."""
    keep_OI = pattern.keep_per_output(weight_OI.abs() * hessian.norm_I)
    return PrunedWeights(weight_OI * keep_OI, keep_OI)
