"""Magnitude pruning: zero the smallest weights, without compensation. The baseline."""

from __future__ import annotations

from torch import Tensor

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern
from racdeploy.recipe import Pruning

MATRICES = 1  # no factor


def prune(
    weight_OI: Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Zero the smallest weights of one linear."""
    keep_OI = pattern.keep(weight_OI.abs())
    return PrunedWeights(weight_OI * keep_OI, keep_OI)
