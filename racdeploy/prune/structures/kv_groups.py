"""Groups of attention heads: key and value head with the query heads that share it.

As many in every block, because engines keep one size of cache; that is smaller, too.
"""

from __future__ import annotations

from racdeploy.errors import UsageError
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
    each = heads // groups
    return Layout(SIZE, groups, {SIZE: K * each, "KV": K, "H": each}, alike=True)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    if structure.share("heads") < 1:
        raise UsageError(
            "heads-with-kv-groups",
            "heads and kv_groups cannot both be cut: groups go with their heads",
            remedy="keep one of the two whole",
        )

    check_share("kv_groups", checkpoint.shape, layout, structure)
