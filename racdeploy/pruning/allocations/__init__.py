"""Allocations of a global sparsity to the linears, one file per allocation.

An allocation file has ``allocate(observations, sizes, sparsity) -> LinearSparsities``: the sparsity
of each linear, with the global sparsity as their mean over all weights. ``NEEDS_SURVEY`` says
whether it needs a survey of the dense model. Then it also has
``observe(weight_OI, hessian, effect, settings) -> Observation``, which is called once per linear.
``effect(weight_OI)`` measures other weights in place of the linear's: it returns the mean over
tokens of |change|² / |output|² at the end of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from racdeploy.files.reading import Json
from racdeploy.pruning.walk.survey import Effect, Observation
from racdeploy.pruning.weights.patterns import LinearSparsities

__all__ = [
    "Allocation",
    "Effect",
    "LinearSparsities",
    "Observation",
    "parse_allocation",
    "shift_sparsities",
]

MAX_SPARSITY = 0.98
_BISECTIONS = 60  # of an interval of 2: down to the precision of a float


@dataclass(frozen=True)
class Allocation:
    """Sparsity of each linear, and the observations that decided on it."""

    sparsities: LinearSparsities
    observations: Mapping[str, Observation]


def parse_allocation(values: Json) -> Allocation:
    """Return the allocation from the values of its file."""
    return Allocation(values["sparsities"], values["observations"])


def shift_sparsities(
    wanted: Mapping[str, float], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Shift the wanted sparsities by one constant until their weighted mean is ``sparsity``.

    Each is clipped to the allowed range, so the constant is found by bisection.
    """
    total = sum(sizes[name] for name in wanted)
    low, high = -1.0, 1.0
    shares = {}

    for _ in range(_BISECTIONS):
        shift = (low + high) / 2
        for name, value in wanted.items():
            shares[name] = min(max(value + shift, 0.0), MAX_SPARSITY)

        mean = sum(shares[name] * sizes[name] for name in shares) / total
        if mean < sparsity:
            low = shift
        else:
            high = shift

    return shares
