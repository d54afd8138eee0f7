"""Context of a pruning: model, batches, settings and processes, shared by survey and walk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from racdeploy.engines.engine import Progress
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import write_atomic
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

    def decide_once(self, file_name: str, decide: Callable[[], Json]) -> Json:
        """Return what ``decide`` returns in all processes, or what an interrupted run decided.

        After a resume, later blocks must fit the finished ones.
        """
        file = self.folder / file_name
        if not self.processes.run_on_first(file.is_file):
            values = decide()
            if self.processes.is_first:
                write_atomic(file, json.dumps(values, indent=1))

        return self.processes.run_on_first(lambda: read_json(file))

    def report_progress(self, label: str, done: int) -> None:
        if self.progress:
            self.progress(label, done, self.model.shape.block_count)
