"""What the looks at the dense model and the walk share: model, batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from racdeploy.engines.engine import Progress
from racdeploy.prune.processes import Processes
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.blocks import Blocks
from racdeploy.recipe import Pruning


@dataclass(frozen=True)
class Session:
    """One process's view of a pruning."""

    blocks: Blocks
    batches: Sequence[Batch]  # of this process; those that are held out come last
    everyones: Sequence[Batch]  # calibration batches of all
    weights_R: torch.Tensor  # what a token of each stream counts, where the blocks are
    settings: Pruning
    folder: Path
    processes: Processes
    progress: Progress | None = None  # called with a label, blocks done and blocks in all
    tasks: Sequence[str] = ()

    @property
    def fitted(self) -> list[Batch]:
        return [batch for batch in self.batches if not batch.held_out]

    def report(self, label: str, done: int) -> None:
        if self.progress:
            self.progress(label, done, self.blocks.shape.block_count)
