"""Zeros that a number format would lose, which are refused or reported before the first stage.

A format declares whether it keeps zeros (``PRESERVES_ZERO``). One that does not keeps some of them
by chance, so the finished file is counted. Codes that pruning chooses keep zeros in every format
that has a grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from racdeploy import packing, plugins, quant
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize_expert
from racdeploy.models.reordering import find_gguf_column_order
from racdeploy.pipeline.job import Job, choose_quants
from racdeploy.quant import presets
from racdeploy.recipe import Export
from racdeploy.targets import Target

_SLAB_WEIGHTS = 1 << 20  # quantized at a time
_MAX_UNPRUNED_ZEROS = 0.02
"""Share of zeros that a model may have without pruning."""


def find_lost_zeros(job: Job) -> str:
    """Return a sentence on the zeros that a job's number format would lose, or an empty string."""
    # Codes are chosen only on a grid that has zero; other formats are refused elsewhere.
    if not job.recipe.prune.sparsity or job.recipe.export.rounding == "optimized":
        return ""

    pruned = job.weights_to_prune
    lost = [name for name in pruned if _loses(job.checkpoint, name, job.quants_of(name))]
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
        if _loses(checkpoint, name, formats):
            weight_OI = checkpoint.read(name)
            zeros += _count_lost(checkpoint, name, weight_OI, formats)
            weights += weight_OI.size

    if zeros > _MAX_UNPRUNED_ZEROS * weights:
        raise UsageError(
            "zeros-would-be-lost",
            f"quant {settings.quant} does not keep zeros: of the linears that it stores, "
            f"{zeros / weights:.1%} of the weights are zero and would be stored as numbers near it",
            remedy="choose q8_0, q4_0 or another format that keeps them; or export nevertheless "
            "with --allow-losing-zeros",
        )


def _loses(checkpoint: Checkpoint, weight: str, quant_names: Sequence[str]) -> bool:
    """Return True if a weight, or one of its parts in the file, loses its zeros."""
    row_length = checkpoint.entries[weight].shape[-1]

    # Rows that do not divide into quant blocks get another format, which keeps zeros.
    forms = [quant.load(name) for name in quant_names]
    return any(
        not quant.explain_misfit(form, row_length) and not form.PRESERVES_ZERO for form in forms
    )


def _count_lost(
    checkpoint: Checkpoint, name: str, weight_OI: NDArray[np.float32], quant_names: Sequence[str]
) -> int:
    """Return the number of zeros that a format loses: all, except those on its grid."""
    O, I = weight_OI.shape
    form = quant.load(quant_names[0])
    if len({*quant_names}) > 1 or not hasattr(form, "CODE_RANGE"):
        return weight_OI.size - int(np.count_nonzero(weight_OI))

    # Columns that share a step are neighbours in the file.
    _, inside = checkpoint.family.split_block(name)
    transform = checkpoint.family.transforms.get(generalize_expert(inside))
    order_I = find_gguf_column_order(transform, checkpoint.shape, I)

    lost = 0
    for start in range(0, O, max(1, _SLAB_WEIGHTS // I)):
        slab_OI = weight_OI[start : start + max(1, _SLAB_WEIGHTS // I)]
        if order_I is not None:
            slab_OI = slab_OI[:, order_I]
        stored_OI = form.dequantize(form.quantize(np.ascontiguousarray(slab_OI)), I)
        lost += int(np.count_nonzero(stored_OI[slab_OI == 0]))
    return lost


def _count_weights(job: Job, names: Sequence[str]) -> int:
    entries = job.checkpoint.entries
    return sum(entries[name].size for name in names)


def _list_keeping(job: Job) -> list[str]:
    """Return the number formats and presets of the target that keep every zero."""
    form = job.recipe.export.format
    taken = Target.read(job.recipe.target).allowed_quants

    formats = packing.list_supported(form, "quant")
    keeping = [name for name in formats if quant.load(name).PRESERVES_ZERO]
    for name in packing.list_supported(form, "presets"):
        mix = plugins.load("presets", name)
        stored = {mix.QUANT, *(rule.quant for rule in mix.RULES)}
        if all(quant.load(each).PRESERVES_ZERO for each in stored):
            keeping.append(name)

    return [name for name in keeping if not taken or name in taken]
