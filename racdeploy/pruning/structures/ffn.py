"""Feed-forward channels: inputs of the linear that ends feed-forward, and the rows for them."""

from __future__ import annotations

from functools import partial

from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.shares import check_share
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "F"
TEXT_KL = {0.9: 0.38, 0.75: 0.73, 0.5: 1.5}


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    channels = shape.sizes[block][SIZE_LETTER]
    return UnitLayout(SIZE_LETTER, channels, {SIZE_LETTER: 1}, step=structure.width_multiple)


check = partial(check_share, "ffn", layout)
