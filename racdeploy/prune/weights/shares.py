"""The sparsity of every linear, where a recipe says that of some: values, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from racdeploy.errors import UsageError
from racdeploy.recipe import Zeros, count_zeros

Shares = dict[str, float]
"""Linear → share of its weights that become zeros."""

LOWEST, HIGHEST = 0.0, 0.98
_NEAR = 1e-3  # of the sparsity: as exact as a recipe has to say it


def fill_shares(given: Mapping[str, Zeros], sizes: Mapping[str, int], sparsity: float) -> Shares:
    """Return the sparsity of each linear where patterns say that of some, and the others make up.

    Raises:
        UsageError: a pattern names no linear, or the others cannot make up for those named.
    """
    named: Shares = {}
    unused = set(given)

    for name in sizes:
        matching = [pattern for pattern in given if re.search(pattern, name)]
        if matching:
            named[name] = count_zeros(given[matching[0]])
            unused -= set(matching)

    if unused:
        raise UsageError(
            "pattern-matches-nothing",
            f"prune.shares: the pattern {min(unused)!r} names no linear that is pruned",
            remedy=f"their names are like {next(iter(sizes), 'none')}",
        )

    weights = sum(sizes.values())
    zeros = sum(share * sizes[name] for name, share in named.items())
    left = weights - sum(sizes[name] for name in named)
    missing = sparsity * weights - zeros

    rest = missing / left if left else 0.0
    is_exact = left or abs(missing) <= _NEAR * weights
    if not is_exact or not LOWEST <= rest <= HIGHEST:
        share = zeros / weights
        raise UsageError(
            "shares-miss-sparsity",
            f"prune.shares make {share:.4f} of all weights zeros by themselves, "
            f"and the others cannot make that {sparsity:g}",
            remedy=f"prune.sparsity = {share:.4f} leaves the others dense",
        )

    return {name: named.get(name, rest) for name in sizes}
