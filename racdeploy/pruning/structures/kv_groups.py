"""Groups of attention heads: a key and a value head with the query heads that share them.

The same number stays in every block, because engines use one cache size, which shrinks, too.
"""

from __future__ import annotations

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.shares import check_share
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "Q"


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    sizes = shape.sizes[block]
    K = sizes["K"]
    heads = sizes["H"]
    groups = sizes["KV"] // K
    per_group = heads // groups
    return UnitLayout(
        SIZE_LETTER, groups, {SIZE_LETTER: K * per_group, "KV": K, "H": per_group}, is_uniform=True
    )


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse an impossible cut with a UsageError."""
    if structure.kept_share("heads") < 1:
        raise UsageError(
            "heads-with-kv-groups",
            "heads and kv_groups cannot both be cut: groups go with their heads",
            remedy="keep one of the two whole",
        )

    check_share("kv_groups", layout, checkpoint, structure)
