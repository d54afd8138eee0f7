"""Error: minimize the sum of the blocks' output errors at the global sparsity.

Each linear is pruned at a few sparsities with the recipe's own method. That gives a curve of its
output error, scaled to the change of the block's output when it alone is pruned. Sparsity is then
raised greedily, one small step at a time, where it costs least.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from racdeploy.pruning.allocations import (
    MAX_SPARSITY,
    Effect,
    LinearSparsities,
    Observation,
    shift_sparsities,
)
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Unstructured
from racdeploy.pruning.weights.refit import prune_and_refit
from racdeploy.recipe import Pruning

NEEDS_SURVEY = True
SPARSITIES = (0.3, 0.5, 0.7, 0.85, 0.98)
MAX_REFIT_STEPS = 5  # more steps, or more sparsities, hardly change the result
SPARSITY_STEP = 0.002
MIN_ERROR = 1e-9  # below it, an error is only rounding


def observe(weight_OI: Tensor, hessian: Hessian, effect: Effect, settings: Pruning) -> Observation:
    """Return sparsity → relative change of the block's output, for one linear."""
    settings = settings.model_copy(
        update={"refit_steps": min(settings.refit_steps, MAX_REFIT_STEPS)}
    )
    energy = hessian.energy(weight_OI) or 1.0  # 0 for a linear of zeros

    # One measured effect scales the whole curve: the one nearest to the recipe's sparsity.
    errors = {}
    gain = 0.0
    nearest_first = sorted(SPARSITIES, key=lambda sparsity: abs(sparsity - settings.sparsity))

    for sparsity in nearest_first:
        pruned = prune_and_refit(weight_OI, hessian, Unstructured(sparsity), settings)
        error = hessian.energy(pruned.weight_OI - weight_OI) / energy
        errors[sparsity] = error
        if not gain and error > MIN_ERROR:  # a linear with zeros of its own may have none
            gain = effect(pruned.weight_OI) / error

    return {f"{sparsity}": gain * errors[sparsity] for sparsity in SPARSITIES}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Return the sparsities with the least sum of errors, found greedily along the curves."""
    grid = np.arange(0.0, MAX_SPARSITY + SPARSITY_STEP / 2, SPARSITY_STEP)

    # Error per weight of each further step. Curves are convex, so greedy steps are optimal.
    prices: list[tuple[float, str]] = []
    for name, observation in observations.items():
        steps = np.diff(_interpolate(observation, grid)) / sizes[name]
        prices += [(price, name) for price in np.maximum.accumulate(steps).tolist()]

    steps_taken = dict.fromkeys(observations, 0)
    remaining = sparsity * sum(sizes[name] for name in observations)
    for _, name in sorted(prices):
        if remaining <= 0:
            break
        remaining -= SPARSITY_STEP * sizes[name]
        steps_taken[name] += 1

    wanted = {name: float(grid[count]) for name, count in steps_taken.items()}
    return shift_sparsities(wanted, sizes, sparsity)


def _interpolate(observation: Observation, grid: np.ndarray) -> np.ndarray:
    """Interpolate the error on a grid of sparsities, linearly in its logarithm.

    Below the first point the first segment is extended. Slopes are made non-decreasing, since the
    greedy search is optimal for convex curves only.
    """
    known = np.array([float(text) for text in observation])
    errors = [*observation.values()]
    logs = np.log(np.maximum(errors, MIN_ERROR))

    first, second = known[:2]
    rise = logs[1] - logs[0]
    below = logs[0] + (grid - first) * rise / (second - first)
    between = np.interp(grid, known, logs)
    curve = np.exp(np.where(grid < first, below, between))

    rises = np.diff(curve)
    rises = np.maximum.accumulate(rises.clip(0))
    convex = curve[0] + np.cumsum(rises)
    return np.insert(convex, 0, curve[0])
