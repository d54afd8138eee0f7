"""Feed-forward channels: inputs of the linear that ends the feed-forward part, and their rows."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP = "width"


def layout(checkpoint: Checkpoint, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    channels = checkpoint.sizes(block)["F"]
    return Layout("F", channels, {"F": 1}, step=structure.width_multiple)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("ffn", checkpoint, layout, structure)
