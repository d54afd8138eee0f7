"""Context of a pruning: model, batches and settings, shared by survey and walk.

It alone, with its work shares, knows the process group: the walk, the methods and the cuts ask it
for sums over all batches, for results of the first process, and for the linears to solve here.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from racdeploy.engines.engine import Progress
from racdeploy.files.reading import Json, read_json
from racdeploy.files.writing import write_atomic
from racdeploy.pruning.process_group import ProcessGroup
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.work_share import WorkShare
from racdeploy.recipe import Pruning

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")
T = TypeVar("T")


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

    @property
    def has_files(self) -> bool:
        """True in the process that reads and writes the files of the pruning."""
        return self.processes.is_first

    def run_once(self, function: Callable[[], T]) -> T:
        """Call a function in the process that has the files; return its result in all."""
        return self.processes.run_on_first(function)

    def send_to_all(self, tensor: Tensor) -> Tensor:
        """Return the tensor of the process that has the files; others pass one of its shape."""
        return self.processes.broadcast(tensor)

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, which is the sum over all batches."""
        for tensor in tensors:
            self.processes.reduce(tensor)

    def merge(self, values: Mapping[str, T]) -> Mapping[str, T]:
        """Return the values of all processes by their keys."""
        return ChainMap(*map(dict, self.processes.all_gather(values)))

    def share_linears(self, costs: Mapping[tuple[str, ...], int]) -> WorkShare:
        """Divide linears among all processes.

        Args:
            costs: linears that one process solves together → their number of weights.
        """
        return WorkShare(self.processes, costs)

    def decide_once(self, file_name: str, decide: Callable[[], R], parse: Callable[[Json], R]) -> R:
        """Return what ``decide`` returns in all processes, or what an interrupted run decided.

        After a resume, later blocks must fit the finished ones.

        Args:
            parse: makes the decision of the JSON object in its file.
        """
        file = self.folder / file_name
        if not self.run_once(file.is_file):
            decision = decide()
            if self.has_files:
                write_atomic(file, json.dumps(asdict(decision), indent=1))

        return parse(self.run_once(lambda: read_json(file)))

    def report_progress(self, label: str, done: int) -> None:
        if self.progress:
            self.progress(label, done, self.model.shape.block_count)
