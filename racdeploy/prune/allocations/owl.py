"""OWL: blocks with more outliers among their weighted activations keep more weights.

An outlier is a |weight| × input norm above five times its linear's mean. Sparsities spread at most 8 points to either
side of the global one. Source: arXiv 2310.05175, section 4.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from racdeploy.prune.allocations import Effect, Observation, Shares, shifted
from racdeploy.prune.hessian import Hessian
from racdeploy.recipe import Pruning

SURVEYS = True
OUTLIER, SPREAD = 5.0, 0.08


def observe(
    weight_OI: torch.Tensor, hessian: Hessian, effect: Effect, settings: Pruning
) -> Observation:
    """Count the outliers of one linear."""
    score_OI = weight_OI.abs() * hessian.norm_I
    return {"outliers": float((score_OI > OUTLIER * score_OI.mean()).sum())}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return one sparsity per block, falling linearly with its share of outliers."""
    found: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)
    for name, observation in observations.items():
        found[_block(name)] += observation["outliers"]
        weights[_block(name)] += sizes[name]
    share = {block: found[block] / weights[block] for block in found}
    low, high = min(share.values()), max(share.values())
    width = (high - low) or 1.0
    wanted = {
        name: sparsity + SPREAD * (1 - 2 * (share[_block(name)] - low) / width)
        for name in observations
    }
    return shifted(wanted, sizes, sparsity)


def _block(name: str) -> str:
    match = re.match(r".*?\.\d+\.", name)
    assert match, f"{name} is in no block"
    return match[0]
