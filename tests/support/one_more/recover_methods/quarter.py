"""The last quarter of the blocks learns."""

from racdeploy.recovery import cost
from racdeploy.recovery.training import distill
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import TrainingRun, list_trained

TRAINS_SCALES = False


def peak_bytes(run: TrainingRun) -> int:
    """Return what :func:`recover` takes at most in memory."""
    return cost.whole_model_bytes(run, _choose(run))


def recover(run: TrainingRun) -> list[LogRow]:
    """Train the weights of the last blocks."""
    return distill(run, _choose(run))


def _choose(run: TrainingRun) -> list[str]:
    family = run.sparse.family
    first = run.sparse.shape.block_count * 3 // 4

    chosen = []
    for name in list_trained(run.sparse):
        block, _ = family.split_block(name)
        if block is None or block >= first:
            chosen.append(name)

    return chosen
