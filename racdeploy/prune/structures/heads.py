"""Query heads: as many of each group that shares a key and a value head.

Where every head has its own, these go with it, and as many in every block: engines keep one size
of cache.
"""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.structure.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP, SIZE = "block", "Q"


def layout(checkpoint: Checkpoint, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    K = checkpoint.head_sizes[block]
    heads = checkpoint.per_block("num_attention_heads")[block]
    groups = checkpoint.per_block("num_key_value_heads")[block]

    if heads == groups:
        return Layout(SIZE, heads, {SIZE: K, "KV": K, "H": 1}, alike=True)
    return Layout(SIZE, heads, {SIZE: K, "H": 1}, cohorts=groups, step=groups)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("heads", checkpoint, layout, structure)
