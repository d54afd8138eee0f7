"""Hidden states of some batches on their way through one model, in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from racdeploy.prune.walk.activations import Activations
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.beside import Beside, Besides
from racdeploy.prune.walk.blocks import Blocks


class Stream:
    """Batches by their numbers, each between two blocks."""

    def __init__(
        self, blocks: Blocks, batches: Mapping[int, Batch], folder: Path, name: str
    ) -> None:
        self._blocks = blocks
        self.places = {index: place for place, index in enumerate(batches)}
        chosen = list(batches.values())
        self._states = Activations(blocks.shapes(chosen), folder / f"states-{name}.bin")
        self._besides = Besides(blocks.shape, blocks.device, chosen, folder, f"states-{name}")
        for place, hidden_BTD in enumerate(blocks.embed(chosen)):
            self._states[place] = hidden_BTD

    def read(self, index: int) -> torch.Tensor:
        return self._states[self.places[index]]

    def beside(self, index: int) -> Beside:
        return self._besides[self.places[index]]

    @torch.no_grad()
    def leave(self, block: nn.Module) -> None:
        """Let all batches pass a block."""
        for place in self.places.values():
            beside = self._besides[place]
            output_BTD = self._blocks.forward(block, self._states[place], beside=beside)
            self._states[place] = output_BTD

    def close(self) -> None:
        """Give the disk back."""
        self._states.close()
        self._besides.close()
