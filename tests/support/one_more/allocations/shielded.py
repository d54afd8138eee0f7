"""Half the sparsity for what ends the feed-forward part; the other linears make up for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from racdeploy.prune.allocations import Effect, Observation, Shares, shift_shares
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
    """Return the sparsity of each linear."""
    wanted = {name: sparsity / 2 if name.endswith("down_proj") else sparsity for name in sizes}
    return shift_shares(wanted, sizes, sparsity)
