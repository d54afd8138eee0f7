"""Uniform: every linear gets the global sparsity."""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy.pruning.allocations import LinearSparsities, Observation

NEEDS_SURVEY = False


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Return the same sparsity for every linear."""
    return dict.fromkeys(sizes, sparsity)
