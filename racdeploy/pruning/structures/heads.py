"""Query heads: the same number of each group that shares a key and a value head.

If every query head has its own key and value head, these are removed with it, and the same number
in every block: engines use one cache size.
"""

from __future__ import annotations

from functools import partial

from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.shares import check_share
from racdeploy.pruning.structures import kv_groups
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "Q"
TEXT_KL = {0.75: 0.98}


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    sizes = shape.sizes[block]
    grouped = kv_groups.layout(shape, block, structure)
    groups = grouped.units
    if sizes["H"] == groups:
        return grouped

    widths = {SIZE_LETTER: sizes["K"], "H": 1}
    return UnitLayout(SIZE_LETTER, sizes["H"], widths, cohorts=groups, step=groups)


check = partial(check_share, "heads", layout)
