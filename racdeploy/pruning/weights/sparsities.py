"""Sparsities of all linears from a recipe that gives those of some; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from racdeploy.errors import UsageError
from racdeploy.recipe import SparsityOrPattern, sparsity_of

LinearSparsities = dict[str, float]
"""Linear → its sparsity, the share of its weights that become zeros."""

MIN_SPARSITY, MAX_SPARSITY = 0.0, 0.98
_TOLERANCE = 1e-3  # of the total sparsity, if patterns name all linears


def fill_sparsities(
    shares: Mapping[str, SparsityOrPattern], sizes: Mapping[str, int], sparsity: float
) -> LinearSparsities:
    """Return the sparsity of each linear: as a pattern gives it; the others share the rest.

    Raises:
        UsageError: a pattern matches no linear, or the others cannot make up the total.
    """
    named: LinearSparsities = {}
    unused = set(shares)
    for name in sizes:
        matching = [pattern for pattern in shares if re.search(pattern, name)]
        if matching:  # the first pattern decides
            named[name] = sparsity_of(shares[matching[0]])
            unused -= set(matching)

    if unused:
        raise UsageError(
            "pattern-matches-nothing",
            f"prune.shares: the pattern {min(unused)!r} names no linear that is pruned",
            remedy=f"their names are like {next(iter(sizes), 'none')}",
        )

    weights = sum(sizes.values())
    zeros = sum(share * sizes[name] for name, share in named.items())
    unnamed = weights - sum(sizes[name] for name in named)
    missing = sparsity * weights - zeros

    rest = missing / unnamed if unnamed else 0.0
    is_exact = unnamed or abs(missing) <= _TOLERANCE * weights
    if not is_exact or not MIN_SPARSITY <= rest <= MAX_SPARSITY:
        share = zeros / weights
        raise UsageError(
            "shares-miss-sparsity",
            f"prune.shares make {share:.4f} of all weights zeros by themselves, "
            f"and the others cannot make that {sparsity:g}",
            remedy=f"prune.sparsity = {share:.4f} leaves the others dense",
        )

    return {name: named.get(name, rest) for name in sizes}
