"""Feed-forward channels: inputs of the linear that ends the feed-forward part, and their rows."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.prune.structure.layout import Layout, check_share
from racdeploy.recipe import Structure

STEP, SIZE = "block", "F"
LEAST_CHANNELS = 64
"""llama.cpp computes 32 wrongly where it uses a processor's AMX: with 96 tokens at once, logits of
Q8_0 and Q4_0 were off by more than their largest (llama-cpp-python 0.3.36)."""


def layout(shape: ModelShape, block: int, structure: Structure) -> Layout:
    """Return what goes together in a block."""
    channels = shape.sizes[block][SIZE]
    step = structure.width_multiple
    return Layout(SIZE, channels, {SIZE: 1}, step=step, least=LEAST_CHANNELS)


def check(checkpoint: Checkpoint, structure: Structure) -> None:
    """Refuse what cannot be, with a UsageError."""
    check_share("ffn", checkpoint.shape, layout, structure)
