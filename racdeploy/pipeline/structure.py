"""What a recipe cuts of a model: whether it can, and what is left of the whole of it."""

from __future__ import annotations

from racdeploy import export, plugins
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import count_parameters
from racdeploy.report.model import Kept


def check_structure(job: Job) -> None:
    """Refuse a cut that the model does not allow, before any work."""
    settings = job.recipe.structure
    for part in settings.parts:
        plugin = plugins.load("structures", part)
        plugin.check(job.checkpoint, job.structure)


def check_format(job: Job) -> None:
    """Refuse a cut whose result the format of a job cannot hold, before any work."""
    settings, name = job.recipe.structure, job.recipe.export.format
    parts, form = settings.parts, export.load(name)
    if not parts or not hasattr(form, "refusal"):
        return

    why = form.refusal(job.checkpoint, parts, settings.uniform)
    if not why:
        return

    remedy = "leave that part whole, or choose another target"
    if not settings.uniform and not form.refusal(job.checkpoint, parts, True):
        remedy = "give all blocks the same widths: --set structure.uniform=true"
    raise UsageError(f"{name} cannot hold what is left: {why}", remedy=remedy)


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
