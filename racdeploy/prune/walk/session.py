"""What the looks at the dense model and the walk share: model, batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from racdeploy.engines.engine import Progress
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import check_covered
from racdeploy.processes.heap import keep_heap
from racdeploy.prune.device import choose_device
from racdeploy.prune.processes import ALONE, Processes
from racdeploy.prune.walk.batches import Batch, make_batches
from racdeploy.prune.walk.blocks import Blocks
from racdeploy.recipe import Pruning, StreamWeights
from racdeploy.traces.trace import STREAMS, Trace


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


def open_session(
    checkpoint: Checkpoint,
    calibration: Sequence[Trace],
    held_out: Sequence[Trace],
    settings: Pruning,
    folder: Path,
    weights: StreamWeights | None,
    threads: int,  # 0 leaves torch's choice; every process uses as many as the first
    progress: Progress | None,
    processes: Processes = ALONE,
) -> Session:
    """Return a process's view, with its share of the traces.

    Raises:
        UsageError: there are no calibration traces.
    """
    if not calibration:
        reason = "no calibration traces are left after selection"
        raise UsageError(reason, remedy="collect more traces")

    check_covered(checkpoint)
    keep_heap()
    torch.set_num_threads(processes.tell(threads or torch.get_num_threads()))

    tasks = sorted({trace.task for trace in (*calibration, *held_out)})
    fitted = make_batches(calibration, tasks, held_out=False)
    batches = fitted + make_batches(held_out, tasks, held_out=True)
    sizes = [batch.ids_BT.numel() for batch in batches]
    own = [batches[index] for index in processes.mine(sizes)]

    blocks = Blocks(checkpoint, settings.compute, choose_device(settings.device))
    counts = weights or StreamWeights()
    weights_R = blocks.place(torch.tensor([getattr(counts, stream) for stream in STREAMS]))
    return Session(
        blocks=blocks,
        batches=own,
        everyones=fitted,
        weights_R=weights_R,
        settings=settings,
        folder=folder,
        processes=processes,
        progress=progress,
        tasks=tasks,
    )
