"""Query heads: the same number of each group that shares a key and a value head.

If every query head has its own key and value head, these are removed with it, and the same number
in every block: engines use one cache size.
"""

from __future__ import annotations

from functools import partial

from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout, check_share
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "Q"


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    sizes = shape.sizes[block]
    K = sizes["K"]
    heads = sizes["H"]
    groups = sizes["KV"] // K

    if heads == groups:
        return UnitLayout(SIZE_LETTER, heads, {SIZE_LETTER: K, "KV": K, "H": 1}, is_uniform=True)
    return UnitLayout(SIZE_LETTER, heads, {SIZE_LETTER: K, "H": 1}, cohorts=groups, step=groups)


check = partial(check_share, "heads", layout)
