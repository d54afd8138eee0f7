"""OWL: blocks with more outliers among their weighted activations keep more weights.

An outlier is a |weight| × input norm above five times its linear's mean. Sparsities differ by at
most 8 points from the global one. Source: arXiv 2310.05175, section 4.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import torch

from racdeploy.pruning.allocations import Effect, LinearSparsities, Observation, shift_sparsities
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.recipe import Pruning

NEEDS_SURVEY = True
OUTLIER_RATIO, MAX_SPREAD = 5.0, 0.08


def observe(
    weight_OI: torch.Tensor, hessian: Hessian, effect: Effect, settings: Pruning
) -> Observation:
    """Count the outliers of one linear."""
    score_OI = weight_OI.abs() * hessian.norm_I
    outlier_OI = score_OI > OUTLIER_RATIO * score_OI.mean()
    return {"outliers": float(outlier_OI.sum())}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Return one sparsity per block, which falls linearly with the block's share of outliers."""
    outliers: dict[str, float] = defaultdict(float)
    weights: dict[str, int] = defaultdict(int)

    for name, observation in observations.items():
        block = _name_block(name)
        outliers[block] += observation["outliers"]
        weights[block] += sizes[name]

    share = {block: outliers[block] / weights[block] for block in outliers}
    lowest = min(share.values())
    width = (max(share.values()) - lowest) or 1.0

    wanted = {}
    for name in observations:
        position = (share[_name_block(name)] - lowest) / width  # 0 to 1
        wanted[name] = sparsity + MAX_SPREAD * (1 - 2 * position)

    return shift_sparsities(wanted, sizes, sparsity)


def _name_block(name: str) -> str:
    match = re.match(r".*?\.\d+\.", name)
    assert match, f"{name} is in no block"
    return match[0]
