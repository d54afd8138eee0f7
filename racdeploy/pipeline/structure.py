"""Structure cuts of a recipe: checks, the expected remaining model, and the measured one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from racdeploy import exporting, plugins
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.job import Job
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.measured_costs import note_text_costs
from racdeploy.pruning.structure.shares import (
    check_input_widths,
    is_far,
    nearest_counts,
    nearest_share,
)
from racdeploy.pruning.structures import list_parts
from racdeploy.pruning.walk.assemble import CutShape, list_cut_entries
from racdeploy.recipe import Structure
from racdeploy.report.structure import describe_remaining
from racdeploy.results.plan import StructurePlan
from racdeploy.results.pruning import KeptStructure, StructureRow

SpreadUnits = Callable[[list[int], Sequence[UnitLayout]], list[int]]
"""Takes the kept units of a part in each block, and the layouts; returns other counts."""


@dataclass(frozen=True)
class ExpectedStructure:
    """Estimate of the model after a cut, as if blocks lost equally and the last ones were removed.

    ``sizes`` are the numbers of weights of every remaining tensor.
    """

    kept: KeptStructure | None
    structure: tuple[StructureRow, ...]
    sizes: Mapping[str, int]


def fit_structure(job: Job) -> Job:
    """Return the job with a cut that its model and formats support, if the cut is optional.

    A share becomes the nearest that the number format allows; a cut to a width for each block
    becomes one width for all blocks, or none. The job's notes say so.
    """
    requested = job.recipe.structure
    if not requested.optional:
        return job

    # The first refusal is reported: it is about the cut that was proposed.
    decided = requested.model_copy(update={"optional": False})
    reason = ""
    for uniform in (requested.uniform, True):
        fitted, snapped = _snap(_cut(job, decided.model_copy(update={"uniform": uniform})))
        try:
            check_structure(fitted)
            for each in (fitted, *fitted.siblings):
                check_format(each)
        except UsageError as error:
            reason = reason or error.message
        else:
            notes = (f"all blocks get the same widths: {reason}",) if reason else ()
            return fitted.with_recipe(fitted.recipe, (*snapped, *notes))

    parts = ", ".join(f"{part} {share:g}" for part, share in requested.keep.items())
    note = f"nothing is cut, though {parts} was proposed: {reason}"
    uncut = _cut(job, decided.model_copy(update={"keep": {}}))
    return uncut.with_recipe(uncut.recipe, (note,))


def _cut(job: Job, structure: Structure) -> Job:
    return job.with_recipe(job.recipe.model_copy(update={"structure": structure}))


def _snap(job: Job) -> tuple[Job, tuple[str, ...]]:
    """Return the job with shares that its blocks can keep, and a note on each that changed."""
    from racdeploy.pruning.structure.cut_plan import keep_everything

    structure, shape = job.structure, job.checkpoint.shape
    keep = dict(job.recipe.structure.keep)
    notes = []

    for part in list_parts(structure, "block"):
        layouts = keep_everything(shape).layouts(shape, part, structure)
        nearest = nearest_share(layouts, keep[part], uniform=structure.uniform)
        if is_far(nearest, keep[part]):
            notes.append(f"{part} {keep[part]:g} became {nearest:.3g}, which whole blocks allow")
            keep[part] = nearest
            if nearest == 1:
                del keep[part]

    return _cut(job, job.recipe.structure.model_copy(update={"keep": keep})), tuple(notes)


def check_structure(job: Job) -> None:
    """Refuse a cut that the model does not support."""
    settings = job.structure
    for part in settings.cut_parts:
        plugins.load("structures", part).check(job.checkpoint, settings)
    check_input_widths(job.checkpoint.shape, settings)

    allocation = job.recipe.prune.allocation
    if "E" in settings.sizes and allocation != "uniform":
        raise UsageError(
            "allocation-with-experts",
            f"prune.allocation = {allocation!r} shares zeros out before it is known which experts"
            " stay",
            remedy='use allocation = "uniform", or leave out --keep experts',
        )


def check_format(job: Job) -> None:
    """Refuse a cut whose result the format of a job cannot store."""
    settings, name = job.recipe.structure, job.recipe.export.format
    sizes, form = settings.sizes, exporting.load(name)
    cuts = list_parts(settings, "block").values()
    uniform_cuts = [cut.layout(job.checkpoint.shape, 0, settings).is_uniform for cut in cuts]
    is_uniform = settings.uniform or all(uniform_cuts)
    reason = form.unsupported_reason(job.checkpoint, sizes, is_uniform) if sizes else ""
    if not reason:
        return

    remedy = "leave that part uncut, or choose another target"
    if not settings.uniform and not form.unsupported_reason(job.checkpoint, sizes, True):
        remedy = "give all blocks the same widths: --set structure.uniform=true"
    raise UsageError(
        "format-cannot-hold-cut", f"{name} cannot store the cut model: {reason}", remedy=remedy
    )


def expect_structure(checkpoint: Checkpoint, settings: Structure) -> ExpectedStructure:
    """Return an estimate of the model after a cut that :func:`check_structure` allowed."""
    from racdeploy.pruning.structure.cut_plan import list_structure_rows

    dense = checkpoint.shape
    shape = expect_shape(dense, settings)
    tokens = dense.vocab_size
    for part, plugin in list_parts(settings, "folder").items():
        tokens = plugin.layout(dense, 0, settings).count(settings.kept_share(part))

    family, vocabulary = checkpoint.family, checkpoint.shape.vocab_size
    sizes = {}

    for name, entry in list_cut_entries(checkpoint, shape).items():
        rows, *others = entry.shape
        if rows == vocabulary and family.split_block(name)[0] is None:
            rows = tokens
        if name in checkpoint.entries:  # the multi-token-prediction head is not cut
            sizes[name] = math.prod((rows, *others))

    kept = _make_kept(
        checkpoint,
        parameters=sum(sizes.values()),
        blocks=len(shape.blocks),
        key_value_heads=shape.widths["num_key_value_heads"][0],
        tokens=tokens,
    )
    return ExpectedStructure(kept, list_structure_rows(dense, shape), sizes)


def plan_cut(job: Job) -> StructurePlan:
    """Return the expected remaining model of a job, and notes on its inputs, for the plan."""
    note = "; ".join(job.input_notes)
    expected = expect_structure(job.checkpoint, job.structure)
    kept = expected.kept
    if kept is None:
        return StructurePlan(note=note)

    about = describe_remaining(kept, expected.structure)
    return StructurePlan(
        note=note,
        parameters_left=kept.parameters,
        keeps=f"about {about}",
        costs=list_cut_costs(job),
    )


def list_cut_costs(job: Job) -> tuple[str, ...]:
    """Return a sentence for each cut of a job that cost a published model much."""
    return tuple(note_text_costs(job.structure, is_recovered=bool(job.recipe.recover.tokens)))


def measure_kept(dense: Checkpoint, pruned: Checkpoint) -> KeptStructure | None:
    """Return the sizes that a pruned model kept; None if it has all its parameters."""
    shape = pruned.shape
    return _make_kept(
        dense,
        parameters=pruned.parameters,
        blocks=shape.block_count,
        key_value_heads=shape.num_key_value_heads,
        tokens=shape.vocab_size,
    )


def _make_kept(
    dense: Checkpoint, *, parameters: int, blocks: int, key_value_heads: int, tokens: int
) -> KeptStructure | None:
    if parameters == dense.parameters:
        return None

    shape = dense.shape
    return KeptStructure(
        parameters=parameters,
        parameters_dense=dense.parameters,
        blocks=blocks,
        blocks_dense=shape.block_count,
        key_value_heads=key_value_heads,
        key_value_heads_dense=shape.num_key_value_heads,
        vocabulary=tokens,
        vocabulary_dense=shape.vocab_size,
    )


def expect_shape(
    dense: ModelShape, settings: Structure, spread: SpreadUnits | None = None
) -> CutShape:
    """Return the shape after a cut, as if the last blocks were removed and the others lost equally.

    ``spread`` may shift units of a part between blocks, with the same sum.
    """
    from racdeploy.pruning.structure.cut_plan import CutPlan, keep_everything

    outline = keep_everything(dense)
    for part, plugin in list_parts(settings, "model").items():
        count = plugin.layout(dense, 0, settings).count(settings.kept_share(part))
        outline = CutPlan(tuple(range(count)), {})

    units = {}
    for part in list_parts(settings, "block"):
        layouts = outline.layouts(dense, part, settings)
        counts = nearest_counts(layouts, settings.kept_share(part), uniform=settings.uniform)
        is_free = not (settings.uniform or layouts[0].is_uniform)
        units[part] = tuple(spread(counts, layouts) if spread and is_free else counts)

    return CutPlan(outline.blocks, units).shape(dense, settings)
