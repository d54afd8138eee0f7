"""Uniform: every linear gets the global sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from racdeploy.prune.allocations import Effect, Observation, Shares
from racdeploy.prune.hessian import Hessian
from racdeploy.recipe import Pruning

SURVEYS = False


def observe(
    weight_OI: torch.Tensor, hessian: Hessian, effect: Effect, settings: Pruning
) -> Observation:
    """Nothing has to be known."""
    return {}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return the same sparsity for every linear."""
    return dict.fromkeys(sizes, sparsity)
