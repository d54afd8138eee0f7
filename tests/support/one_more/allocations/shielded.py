"""Half the sparsity for what ends the feed-forward part; the other linears make up for it."""

from __future__ import annotations

from collections.abc import Mapping

from racdeploy.prune.allocations import Observation, Shares, shift_shares

SURVEYS = False


def allocate(
    observations: Mapping[str, Observation], sizes: Mapping[str, int], sparsity: float
) -> Shares:
    """Return the sparsity of each linear."""
    wanted = {name: sparsity / 2 if name.endswith("down_proj") else sparsity for name in sizes}
    return shift_shares(wanted, sizes, sparsity)
