"""Error: the sum of the errors that linears leave at the end of their blocks is as small as one budget allows.

Each linear of the dense model is pruned at a few sparsities with the recipe's own method, which gives its curve of
output error over sparsity. What such an error is worth is measured: pruned to about the global sparsity, the linear
alone changes its block's output, token by token, by a share that the curve is scaled to. Weights then go one step at a
time from where they are missed least.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np
import torch

from racdeploy import plugins
from racdeploy.prune.allocations import HIGHEST, Effect, Observation, Shares, shifted
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.patterns import Unstructured
from racdeploy.prune.refit import prune_and_refit
from racdeploy.recipe import Pruning

SURVEYS = True
SPARSITIES = (0.3, 0.5, 0.7, 0.85, 0.98)
REFIT_STEPS = 5  # at most: more of them, or more sparsities, find hardly other shares
STEP, LEAST_ERROR = 0.002, 1e-9


def observe(
    weight_OI: torch.Tensor, hessian: Hessian, effect: Effect, settings: Pruning
) -> Observation:
    """Return sparsity → share of the block's output that changes."""
    method, errors, gain = plugins.load("methods", settings.method), dict[float, float](), 0.0
    settings = settings.model_copy(update={"refit_steps": min(settings.refit_steps, REFIT_STEPS)})
    energy = _energy(weight_OI, hessian) or 1.0  # of a linear that is zero
    for sparsity in sorted(SPARSITIES, key=lambda sparsity: abs(sparsity - settings.sparsity)):
        pruned = prune_and_refit(method, weight_OI, hessian, Unstructured(sparsity), settings)
        errors[sparsity] = error = _energy(pruned.weight_OI - weight_OI, hessian) / energy
        if not gain and error > LEAST_ERROR:  # a linear that was sparse already has none at first
            gain = effect(pruned.weight_OI) / error
    return {f"{sparsity}": gain * errors[sparsity] for sparsity in SPARSITIES}


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return the sparsities with the least sum of errors, greedily along the curves."""
    grid = np.arange(0.0, HIGHEST + STEP / 2, STEP)
    curves = {name: _curve(observation, grid) for name, observation in observations.items()}
    place = dict.fromkeys(curves, 0)
    left = sparsity * sum(sizes[name] for name in curves)
    heap = [(_price(curve, 0, sizes[name]), name) for name, curve in curves.items()]
    heapq.heapify(heap)
    while heap and left > 0:
        _, name = heapq.heappop(heap)
        left -= STEP * sizes[name]
        place[name] += 1
        if place[name] + 1 < len(grid):
            heapq.heappush(heap, (_price(curves[name], place[name], sizes[name]), name))
    return shifted({name: float(grid[index]) for name, index in place.items()}, sizes, sparsity)


def _energy(weight_OI: torch.Tensor, hessian: Hessian) -> float:
    """Return the mean squared output of a linear over calibration tokens."""
    return float(((weight_OI @ hessian.matrix_II) * weight_OI).sum())


def _curve(observation: Observation, grid: np.ndarray) -> np.ndarray:
    """Interpolate the logarithm of the error, and go on below the first point as between the first two."""
    known = np.array([float(text) for text in observation])
    errors = np.maximum([*observation.values()], LEAST_ERROR)
    logs = np.log(errors)
    first = logs[0] + (grid - known[0]) * (logs[1] - logs[0]) / (known[1] - known[0])
    curve = np.exp(np.where(grid < known[0], first, np.interp(grid, known, logs)))
    # the greedy search needs slopes that never fall
    return np.concatenate(
        [[curve[0]], curve[0] + np.cumsum(np.maximum.accumulate(np.maximum(np.diff(curve), 0)))]
    )


def _price(curve: np.ndarray, index: int, size: int) -> float:
    """Error per weight of the next step."""
    return float(curve[index + 1] - curve[index]) / size
