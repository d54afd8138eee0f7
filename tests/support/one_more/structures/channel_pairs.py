"""Feed-forward channels two by two, as an engine with wide registers might want them."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.shares import check_share
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "F"


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return what goes together in a block."""
    pairs = shape.sizes[block][SIZE_LETTER] // 2
    return UnitLayout(SIZE_LETTER, pairs, {SIZE_LETTER: 2}, step=structure.width_multiple // 2)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("channel_pairs", layout, checkpoint, structure)
