"""Feed-forward channels: inputs of the linear that ends feed-forward, and the rows for them."""

from __future__ import annotations

from functools import partial

from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.layout import UnitLayout, check_share
from racdeploy.recipe import Structure

SCOPE, SIZE_LETTER = "block", "F"
MIN_CHANNELS = 64
"""llama.cpp computes a width of 32 wrongly with a processor's AMX: at 96 tokens at once, logits of
Q8_0 and Q4_0 were off by more than the largest logit (llama-cpp-python 0.3.36)."""


def layout(shape: ModelShape, block: int, structure: Structure) -> UnitLayout:
    """Return the units of a block."""
    channels = shape.sizes[block][SIZE_LETTER]
    step = structure.width_multiple
    return UnitLayout(SIZE_LETTER, channels, {SIZE_LETTER: 1}, step=step, min_count=MIN_CHANNELS)


check = partial(check_share, "ffn", layout)
