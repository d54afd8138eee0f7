"""The calibration batches on their way through one model: hidden states, and inputs within a block.

The inputs of the linears that end attention and the feed-forward part are kept on disk: later
passes of a block start there, with the same results and about half the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from racdeploy.prune.walk.activations import Activations
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.beside import Besides
from racdeploy.prune.walk.blocks import Blocks
from racdeploy.prune.walk.routing import Routed

KEPT_BYTES = 2 << 30
"""Of inputs on disk; later batches compute theirs each time."""


class Flow:
    """Batches between and within the blocks of one model."""

    def __init__(
        self,
        blocks: Blocks,
        batches: Sequence[Batch],
        folder: Path,
        name: str,
    ) -> None:
        self._blocks, self._batches = blocks, batches
        self.hidden = Activations(blocks.shapes(batches), folder / f"hidden-{name}.bin")
        self.besides = Besides(blocks.shape, blocks.device, batches, folder, name)

        widths = blocks.end_widths()
        kept = _choose_kept(batches, sum(widths.values()))

        self._inputs: dict[int, Activations] = {}

        for group, I in widths.items():
            file = folder / f"input-{name}-{group}.bin"
            shapes = [(*batch.ids_BT.shape, I) for batch in kept]
            self._inputs[group] = Activations(shapes, file, window_bytes=0)

        self._known: list[set[int]] = [set() for _ in kept]  # groups with an input in this block

    def enter(self, indices: Sequence[int]) -> None:
        """Let some batches come before the first block."""
        chosen = [self._batches[index] for index in indices]
        for index, hidden_BTD in zip(indices, self._blocks.embed(chosen), strict=True):
            self.hidden[index] = hidden_BTD

    def input(
        self, block: nn.Module, group: int, index: int, *, final: bool = True
    ) -> torch.Tensor:
        """Return what reaches a group of linears; ``final``: nothing before it changes any more."""
        linear = self._blocks.groups(block)[group][0]
        known = {place: x for place, x in self._inputs_of(index).items() if place < group}
        beside = self.besides[index]
        found_BTI = self._blocks.input(block, linear, self.hidden[index], known, beside)

        if final and group in self._inputs and index < len(self._known):
            self._inputs[group][index] = found_BTI.float()
            self._known[index].add(group)

        return found_BTI

    def routed(self, block: nn.Module, index: int) -> Routed:
        """Return what reaches the experts of a block, whose attention does not change any more."""
        known, beside = self._inputs_of(index), self.besides[index]
        return self._blocks.routed(block, self.hidden[index], known, beside)

    def output(self, block: nn.Module, index: int) -> torch.Tensor:
        """Return what a block makes of a batch, which stays before it."""
        known, beside = self._inputs_of(index), self.besides[index]
        return self._blocks.forward(block, self.hidden[index], known, beside)

    def leave(self, block: nn.Module, index: int) -> torch.Tensor:
        """Return the block's output for a batch; it enters the next block."""
        output_BTD = self.output(block, index)
        self.hidden[index] = output_BTD
        if index < len(self._known):
            self._known[index].clear()
        return output_BTD

    def close(self) -> None:
        """Give memory and disk back."""
        self.besides.close()
        for activations in (self.hidden, *self._inputs.values()):
            activations.close()

    def _inputs_of(self, index: int) -> dict[int, torch.Tensor]:
        known = self._known[index] if index < len(self._known) else ()
        return {group: self._inputs[group][index] for group in known}


def _choose_kept(batches: Sequence[Batch], width: int) -> list[Batch]:
    """Return the first calibration batches whose inputs, ``width`` together, fit."""
    kept = []
    size_bytes = 0

    for batch in batches:
        size_bytes += 4 * batch.ids_BT.numel() * width
        if batch.held_out or size_bytes > KEPT_BYTES:
            break

        kept.append(batch)

    return kept
