"""Query heads: as many of each group that shares a key and a value head.

Where every head has its own, these go with it, and as many in every block: engines keep one size
of cache.
"""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.prune.structure.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP, SIZE = "block", "Q"


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    sizes = shape.sizes[block]
    K = sizes["K"]
    heads = sizes["H"]
    groups = sizes["KV"] // K

    if heads == groups:
        return Layout(SIZE, heads, {SIZE: K, "KV": K, "H": 1}, alike=True)
    return Layout(SIZE, heads, {SIZE: K, "H": 1}, cohorts=groups, step=groups)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("heads", checkpoint.shape, layout, structure)
