"""The calibration batches on their way through one model: hidden states between blocks, and inputs within a block.

A block is passed several times, up to the input of each group of linears and to its end. The inputs of the linears that
end attention and the feed-forward part are kept on disk: later passes start there and leave out what comes before. The
results are the same; about half as much is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from racdeploy.prune.activations import Activations
from racdeploy.prune.batches import Batch
from racdeploy.prune.blocks import Blocks

KEPT_BYTES = 2 << 30


def is_kept(group: int) -> bool:
    """Return whether the input of a group of linears is kept: that of the one linear that ends a part of the block."""
    return group % 2 == 1


class Flow:
    """Batches between and within the blocks of one model.

    Args:
        blocks: of the model.
        batches: in their order.
        folder: for scratch files.
        name: of the scratch files.
        kept_bytes: disk space for inputs within a block; batches beyond it are computed anew in every pass.
    """

    def __init__(
        self,
        blocks: Blocks,
        batches: Sequence[Batch],
        folder: Path,
        name: str,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._blocks = blocks
        shapes = blocks.shapes(batches)
        self.hidden = Activations(shapes, folder / f"hidden-{name}.bin")
        widths = {group: width for group, width in enumerate(blocks.widths()) if is_kept(group)}
        tokens, kept = 0, list[tuple[int, int]]()
        for batch, (B, T, _) in zip(batches, shapes, strict=True):
            tokens += B * T
            if batch.held_out or 4 * tokens * sum(widths.values()) > kept_bytes:
                break
            kept.append((B, T))
        self._inputs = {
            group: Activations(
                [(B, T, width) for B, T in kept],
                folder / f"input-{name}-{group}.bin",
                window_bytes=0,
            )
            for group, width in widths.items()
        }
        self._known: list[set[int]] = [set() for _ in kept]

    def input(self, block: nn.Module, group: int, index: int) -> torch.Tensor:
        """Return what reaches a group of linears, of the batch of that index; groups are asked for in their order."""
        linear = self._blocks.checkpoint.family.input_groups[group][0]
        found_BTI = self._blocks.input(block, linear, self.hidden[index], self._inputs_of(index))
        if is_kept(group) and index < len(self._known):
            self._inputs[group][index] = found_BTI.float()
            self._known[index].add(group)
        return found_BTI

    def leave(self, block: nn.Module, index: int) -> torch.Tensor:
        """Return the block's output for a batch; it enters the next block."""
        output_BTD = self._blocks.forward(block, self.hidden[index], self._inputs_of(index))
        self.hidden[index] = output_BTD
        if index < len(self._known):
            self._known[index].clear()
        return output_BTD

    def close(self) -> None:
        """Give memory and disk back."""
        for activations in (self.hidden, *self._inputs.values()):
            activations.close()

    def _inputs_of(self, index: int) -> dict[int, torch.Tensor]:
        known = self._known[index] if index < len(self._known) else ()
        return {group: self._inputs[group][index] for group in known}
