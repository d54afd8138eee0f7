"""Context of a pruning: model, batches and settings, shared by survey and walk.

The walk, the methods and the cuts ask its share for sums over all batches and for results of the
process that has the files, and its work shares for the linears to solve here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from racdeploy.engines.engine import Progress
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import write_atomic
from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.work_share import WorkShare
from racdeploy.recipe import Pruning

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True)
class PruningSession:
    """One process's view of a pruning."""

    model: BlockwiseModel
    batches: Sequence[Batch]  # of this process; held-out ones come last
    all_calibration_batches: Sequence[Batch]  # calibration batches of all processes
    settings: Pruning
    folder: Path
    share: JobShare = WHOLE_SHARE
    progress: Progress | None = None  # called with a label, blocks done and blocks in all
    tasks: Sequence[str] = ()

    @property
    def calibration_batches(self) -> list[Batch]:
        return [batch for batch in self.batches if not batch.held_out]

    def share_linears(self, costs: Mapping[tuple[str, ...], int]) -> WorkShare:
        """Divide linears among all processes.

        Args:
            costs: linears that one process solves together → their number of weights.
        """
        return WorkShare(self.share, costs)

    def decide_once(self, file_name: str, decide: Callable[[], R], parse: Callable[[Json], R]) -> R:
        """Return what ``decide`` returns in all processes, or what an interrupted run decided.

        After a resume, later blocks must fit the finished ones.

        Args:
            parse: makes the decision of the JSON object in its file.
        """
        file = self.folder / file_name
        if not self.share.run_once(file.is_file):
            decision = decide()
            if self.share.has_files:
                write_atomic(file, json.dumps(asdict(decision), indent=1))

        return parse(self.share.run_once(lambda: read_json(file)))

    def report_progress(self, label: str, done: int) -> None:
        if self.progress:
            self.progress(label, done, self.model.shape.block_count)
