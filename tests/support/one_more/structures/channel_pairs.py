"""Feed-forward channels two by two, as an engine with wide registers might want them."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.prune.structure.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP, SIZE = "block", "F"


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    pairs = shape.sizes[block][SIZE] // 2
    return Layout(SIZE, pairs, {SIZE: 2}, step=structure.width_multiple // 2)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("channel_pairs", checkpoint.shape, layout, structure)
