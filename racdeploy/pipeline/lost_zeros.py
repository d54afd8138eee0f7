"""Zeros that a number format would lose, which are refused or reported before the first stage.

A format declares whether it keeps zeros (``preserves_zero``). One that does not keeps some of them
by chance, so the finished file is counted. Chosen codes keep zeros wherever a code is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from racdeploy import packing, quant
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job, choose_quants
from racdeploy.quant import presets
from racdeploy.recipe import Export
from racdeploy.targets import Target

_MAX_UNPRUNED_ZEROS = 0.02
"""Share of zeros that a model may have without pruning."""


def find_lost_zeros(job: Job) -> str:
    """Return a sentence on the zeros that a job's number format would lose, or an empty string."""
    if not job.recipe.prune.sparsity:
        return ""

    pruned = job.weights_to_prune
    lost = []
    for name in pruned:
        # Chosen codes keep zeros wherever a code is zero, the formats' own rounding does not.
        if chosen := job.rounding_quants.get(name.removesuffix(".weight")):
            keeps = quant.load_grid(chosen).has_zero
        else:
            keeps = not _lose_zeros(job.quants_of(name))
        if not keeps:
            lost.append(name)
    if not lost:
        return ""

    formats = sorted({each for name in lost for each in job.quants_of(name)})
    share = _count_weights(job, lost) / _count_weights(job, pruned)

    return (
        f"quant {job.recipe.export.quant} does not keep zeros: {len(lost)} of {len(pruned)} "
        f"linears are stored as {', '.join(formats)}, "
        f"with {share:.0%} of the weights that are pruned"
    )


def check_zeros(job: Job) -> None:
    """Refuse a number format that loses zeros, unless the recipe allows it."""
    lost = find_lost_zeros(job)
    if not lost or job.recipe.export.allow_losing_zeros:
        return

    sparsity = job.recipe.prune.sparsity
    keeping = ", ".join(_list_keeping(job))
    raise UsageError(
        "zeros-would-be-lost",
        f"{lost}: there, the requested {sparsity:.1%} zeros would be lost",
        remedy=f"keep them with one of {keeping}; or cut structure in place of zeros, as with "
        "--keep ffn=0.75; or build nevertheless with --allow-losing-zeros",
    )


def check_folder_zeros(checkpoint: Checkpoint, settings: Export) -> None:
    """Refuse to export a pruned model in a number format that loses its zeros."""
    if settings.allow_losing_zeros:
        return

    # Dense models have a few zeros too; only a pruned one has more than a small share.
    rules = presets.read(settings.quant, settings.tensors)
    zeros = weights = 0
    for name in checkpoint.shape.prunable_weights:
        formats = choose_quants(checkpoint, name, rules)
        is_ready = {checkpoint.entries[name].quant} == {*formats}
        if not is_ready and _lose_zeros(formats):
            weight_OI = checkpoint.read(name)
            zeros += weight_OI.size - int(np.count_nonzero(weight_OI))
            weights += weight_OI.size

    if zeros > _MAX_UNPRUNED_ZEROS * weights:
        raise UsageError(
            "zeros-would-be-lost",
            f"quant {settings.quant} does not keep zeros: of the linears that it stores, "
            f"{zeros / weights:.1%} of the weights are zero and would be stored as numbers near it",
            remedy="choose q8_0, q4_0 or another format that keeps them; or export nevertheless "
            "with --allow-losing-zeros",
        )


def _lose_zeros(quant_names: Sequence[str]) -> bool:
    """Return True if one of the formats of a weight's parts in the file loses zeros."""
    return not all(quant.load(name).preserves_zero for name in quant_names)


def _count_weights(job: Job, names: Sequence[str]) -> int:
    entries = job.checkpoint.entries
    return sum(entries[name].size for name in names)


def _list_keeping(job: Job) -> list[str]:
    """Return the number formats and presets of the target that keep every zero."""
    form = job.recipe.export.format
    taken = Target.read(job.recipe.target).allowed_quants

    keeping = []
    for name in (*packing.list_supported(form, "quant"), *packing.list_supported(form, "presets")):
        rules = presets.read(name)
        stored = [rules.quant, *(rule.quant for rule in rules.rules)]
        if not _lose_zeros(stored) and (not taken or name in taken):
            keeping.append(name)
    return keeping
