"""Allocations: how a global sparsity is shared out among the linears, one file per way.

An allocation file has ``SURVEYS``, whether it must look at the dense model first; ``observe(weight_OI, hessian,
effect, settings) -> Observation``, called once for each linear of the dense model if it must; and
``allocate(observations, sizes, sparsity) -> Shares``. The mean of the shares over all weights is the global sparsity.
``effect`` says of other weights for the linear what they do: the mean over tokens of |change|² / |output|² at the end
of its block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["Effect", "Observation", "Shares", "shifted"]

Effect = Callable[[torch.Tensor], float]
Observation = Mapping[str, float]
Shares = dict[str, float]
LOWEST, HIGHEST = 0.0, 0.98


def shifted(wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> Shares:
    """Return the wanted sparsities moved by one constant, within bounds, so that their weighted mean is right.

    Args:
        wanted: sparsity of each linear.
        sizes: number of weights of each linear.
        sparsity: the mean to reach.
    """
    low, high, total = -1.0, 1.0, sum(sizes[name] for name in wanted)
    for _ in range(60):
        middle = (low + high) / 2
        shares = {name: min(max(value + middle, LOWEST), HIGHEST) for name, value in wanted.items()}
        mean = sum(shares[name] * sizes[name] for name in shares) / total
        low, high = (middle, high) if mean < sparsity else (low, middle)
    return shares
