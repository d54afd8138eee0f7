"""Train norms, biases and, where codes were chosen while pruning, the quantization scales.

These are few numbers, so it is cheap and can do little harm. It comes last, on the final codes.
"""

from __future__ import annotations

from functools import partial

from racdeploy.recovery import cost
from racdeploy.recovery.parameters import ScaleParameters
from racdeploy.recovery.training import distill
from racdeploy.recovery.training_log import LogRow
from racdeploy.recovery.training_run import TrainingRun, list_trained

TRAINS_SCALES = True


def peak_bytes(run: TrainingRun) -> int:
    """Return the peak memory of :func:`recover` in bytes."""
    vectors = list_trained(run.sparse, vectors_only=True)
    return cost.whole_model_bytes(run, [*vectors, *run.sparse.coded])


def recover(run: TrainingRun) -> list[LogRow]:
    """Train vectors and scales; zeros and codes do not change."""
    vectors, coded = list_trained(run.sparse, vectors_only=True), run.sparse.coded
    arrange = partial(ScaleParameters, coded=coded, share=run.share)
    return distill(run, [*vectors, *coded], arrange)
