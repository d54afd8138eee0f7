"""Train one block at a time against the dense model's block: as little memory as pruning."""

from __future__ import annotations

from contextlib import closing

from racdeploy.recovery import cost
from racdeploy.recovery.blockwise_training import BlockwiseTraining
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import TrainingRun

TRAINS_SCALES = False


def peak_bytes(run: TrainingRun) -> int:
    """Return the peak memory of :func:`recover` in bytes."""
    return cost.one_block_bytes(run)


def recover(run: TrainingRun) -> list[LogRow]:
    """Train block after block; the loss is on hidden states, so ``run.direction`` is not used."""
    with closing(BlockwiseTraining(run)) as walk:
        return walk.run()
