"""Train every kept weight of the blocks, the whole model in memory: best quality, most memory."""

from __future__ import annotations

from racdeploy.recovery import cost
from racdeploy.recovery.training import distill
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import TrainingRun, list_trained

TRAINS_SCALES = False


def peak_bytes(run: TrainingRun) -> int:
    """Return the peak memory of :func:`recover` in bytes."""
    return cost.whole_model_bytes(run, list_trained(run.sparse))


def recover(run: TrainingRun) -> list[LogRow]:
    """Train all weights of the blocks that are not zero."""
    return distill(run, list_trained(run.sparse))
