"""Magnitude pruning: the smallest weights go, nothing is compensated. The baseline."""

from __future__ import annotations

import torch

from racdeploy.prune.methods import Pruned
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.weights.patterns import Pattern
from racdeploy.recipe import Pruning

MATRICES = 1  # no factor


def prune(weight_OI: torch.Tensor, hessian: Hessian, pattern: Pattern, settings: Pruning) -> Pruned:
    """Zero the smallest weights of one linear."""
    keep_OI = pattern.keep(weight_OI.abs())
    return Pruned(weight_OI * keep_OI, keep_OI)
