"""A random mask, the same for linears of one shape: what every method has to beat."""

from __future__ import annotations

import torch

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Pattern
from racdeploy.recipe import Pruning


def prune(
    weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning
) -> PrunedWeights:
    """Zero weights of one linear by lot."""
    generator = torch.Generator().manual_seed(0)
    score_OI = torch.rand(weight_OI.shape, generator=generator)
    keep_OI = pattern.keep(score_OI)
    return PrunedWeights(weight_OI * keep_OI, keep_OI)
