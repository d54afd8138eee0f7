"""Context of a pruning: model, batches, settings and processes, shared by survey and walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy.engines.engine import Progress
from racdeploy.pruning.process_group import ProcessGroup
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.recipe import Pruning


@dataclass(frozen=True)
class PruningSession:
    """One process's view of a pruning."""

    model: BlockwiseModel
    batches: Sequence[Batch]  # of this process; held-out ones come last
    all_calibration_batches: Sequence[Batch]  # calibration batches of all processes
    settings: Pruning
    folder: Path
    processes: ProcessGroup
    progress: Progress | None = None  # called with a label, blocks done and blocks in all
    tasks: Sequence[str] = ()

    @property
    def calibration_batches(self) -> list[Batch]:
        return [batch for batch in self.batches if not batch.held_out]

    def report_progress(self, label: str, done: int) -> None:
        if self.progress:
            self.progress(label, done, self.model.shape.block_count)
