"""Half the sparsity for what ends the feed-forward part; the other linears make up for it."""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy.pruning.allocations import LinearSparsities, Observation, shift_sparsities

NEEDS_SURVEY = False


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Return the sparsity of each linear."""
    wanted = {name: sparsity / 2 if name.endswith("down_proj") else sparsity for name in sizes}
    return shift_sparsities(wanted, sizes, sparsity)
