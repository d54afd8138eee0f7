"""Feed-forward channels two by two, as an engine with wide registers might want them."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP = "width"


def layout(checkpoint: Checkpoint, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    pairs = checkpoint.sizes(block)["F"] // 2
    return Layout("F", pairs, {"F": 2}, step=structure.width_multiple // 2)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("channel_pairs", checkpoint, layout, structure)
