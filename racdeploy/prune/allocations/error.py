"""Error: the least sum of errors at the ends of the blocks that the global sparsity allows.

Each linear is pruned at a few sparsities with the recipe's own method: a curve of output error,
scaled to what pruning it alone changes of its block's output. Weights then go one step at a time
from where they are missed least.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
import torch

from racdeploy import plugins
from racdeploy.prune.allocations import Effect, Observation, Shares, shift_shares
from racdeploy.prune.walk.hessian import Hessian
from racdeploy.prune.weights.patterns import Unstructured
from racdeploy.prune.weights.refit import prune_and_refit
from racdeploy.prune.weights.shares import HIGHEST
from racdeploy.recipe import Pruning

SURVEYS = True
SPARSITIES = (0.3, 0.5, 0.7, 0.85, 0.98)
REFIT_STEPS = 5  # at most: more of them, or more sparsities, find hardly other shares
STEP = 0.002  # of sparsity, at a time
LEAST_ERROR = 1e-9  # below it, rounding is all there is


def observe(
    weight_OI: torch.Tensor, hessian: Hessian, effect: Effect, settings: Pruning
) -> Observation:
    """Return sparsity → share of the block's output that changes."""
    method = plugins.load("methods", settings.method)
    settings = settings.model_copy(update={"refit_steps": min(settings.refit_steps, REFIT_STEPS)})
    energy = hessian.energy(weight_OI) or 1.0  # of a linear that is zero

    errors: dict[float, float] = {}
    gain = 0.0
    nearest_first = sorted(SPARSITIES, key=lambda sparsity: abs(sparsity - settings.sparsity))

    for sparsity in nearest_first:
        pruned = prune_and_refit(method, weight_OI, hessian, Unstructured(sparsity), settings)
        error = hessian.energy(pruned.weight_OI - weight_OI) / energy
        errors[sparsity] = error
        if not gain and error > LEAST_ERROR:  # a linear that was sparse already has none at first
            gain = effect(pruned.weight_OI) / error

    return {f"{sparsity}": gain * errors[sparsity] for sparsity in SPARSITIES}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return the sparsities with the least sum of errors, greedily along the curves."""
    grid = np.arange(0.0, HIGHEST + STEP / 2, STEP)

    prices = {}  # of a weight of each linear, step by step; the cheapest step is taken first

    for name, observation in observations.items():
        steps = np.diff(_interpolate(observation, grid))
        prices[name] = (steps / sizes[name]).tolist()

    heap = [(price[0], name) for name, price in prices.items()]
    heapq.heapify(heap)

    taken = dict.fromkeys(prices, 0)
    left = sparsity * sum(sizes[name] for name in prices)

    while heap and left > 0:
        _, name = heapq.heappop(heap)
        left -= STEP * sizes[name]
        taken[name] += 1

        still = prices[name][taken[name] :]
        if still:
            heapq.heappush(heap, (still[0], name))

    wanted = {name: float(grid[count]) for name, count in taken.items()}
    return shift_shares(wanted, sizes, sparsity)


def _interpolate(observation: Observation, grid: np.ndarray) -> np.ndarray:
    """Return the error on a grid of sparsities, from a logarithm that is linear between the points.

    Before the first point it goes on as after it; slopes never fall, as the greedy search needs.
    """
    known = np.array([float(text) for text in observation])
    errors = [*observation.values()]
    logs = np.log(np.maximum(errors, LEAST_ERROR))

    first, second = known[:2]
    rise = logs[1] - logs[0]
    below = logs[0] + (grid - first) * rise / (second - first)
    between = np.interp(grid, known, logs)
    curve = np.exp(np.where(grid < first, below, between))

    rises = np.diff(curve)
    rises = np.maximum.accumulate(rises.clip(0))
    straight = curve[0] + np.cumsum(rises)
    return np.insert(straight, 0, curve[0])
