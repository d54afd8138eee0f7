"""Uniform: every linear gets the global sparsity."""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy.prune.allocations import Observation, Shares

SURVEYS = False


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return the same sparsity for every linear."""
    return dict.fromkeys(sizes, sparsity)
