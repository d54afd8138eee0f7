"""What was cut of a model, over the whole of it."""

from __future__ import annotations

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.naming import count_parameters
from racdeploy.report.model import Kept


def measure_kept(dense: Checkpoint, pruned: Checkpoint) -> Kept | None:
    """Return what is left of a model; None where it has as many parameters as before."""
    parameters, parameters_dense = count_parameters(pruned), count_parameters(dense)
    if parameters == parameters_dense:
        return None

    return Kept(
        parameters=parameters,
        parameters_dense=parameters_dense,
        blocks=pruned.block_count,
        blocks_dense=dense.block_count,
        key_value_heads=pruned.key_value_heads,
        key_value_heads_dense=dense.key_value_heads,
        vocabulary=pruned.integer("vocab_size"),
        vocabulary_dense=dense.integer("vocab_size"),
    )
