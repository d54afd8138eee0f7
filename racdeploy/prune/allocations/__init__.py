"""Allocations: how a global sparsity is shared out among the linears, one file per way.

An allocation file has ``allocate(observations, sizes, sparsity) -> Shares``, whose mean over all
weights is the global sparsity, and ``SURVEYS``, whether it must look at the dense model first. Then
``observe(weight_OI, hessian, effect, settings) -> Observation`` is called once for each linear.
``effect(weight_OI)`` returns what other weights do in place of the linear's: the mean over tokens
of |change|² / |output|² at the end of its block.
"""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy.prune.walk.survey import Effect, Observation
from racdeploy.prune.weights.shares import HIGHEST, LOWEST, Shares

__all__ = ["Effect", "Observation", "Shares", "shift_shares"]

_HALVINGS = 60  # of an interval of 2: as narrow as a float is exact


def shift_shares(wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> Shares:
    """Return the wanted sparsities moved by one constant, within bounds, to a weighted mean."""
    total = sum(sizes[name] for name in wanted)
    low, high = -1.0, 1.0

    shares: Shares = {}

    for _ in range(_HALVINGS):
        shift = (low + high) / 2
        for name, value in wanted.items():
            shares[name] = min(max(value + shift, LOWEST), HIGHEST)

        mean = sum(shares[name] * sizes[name] for name in shares) / total
        if mean < sparsity:
            low = shift
        else:
            high = shift

    return shares
