"""What a recipe cuts of a model: whether it can, what will be left of the whole, and what is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from racdeploy import export, plugins
from racdeploy.errors import UsageError
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import generalize
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.job import Job
from racdeploy.prune.structure.layout import Layout, keep_alike
from racdeploy.prune.structures import list_parts
from racdeploy.prune.walk.assemble import CutShape
from racdeploy.recipe import Structure
from racdeploy.report.structure import describe_kept
from racdeploy.results.pruning import Kept, StructureRow

Spread = Callable[[list[int], Sequence[Layout]], list[int]]
"""Gets how many units of a part each block keeps, and their layouts; returns other counts."""


@dataclass(frozen=True)
class Expected:
    """About what a cut will leave, as if blocks lost alike and the last ones went.

    ``sizes`` are the weights of every tensor that is left.
    """

    kept: Kept | None
    structure: tuple[StructureRow, ...]
    sizes: Mapping[str, int]


def fit_structure(job: Job) -> Job:
    """Return the job with a cut that its model and formats have room for, where it is optional.

    What can't be cut to a width for each block is cut to one for all, or not at all; the job's
    notes say so.
    """
    asked = job.recipe.structure
    if not asked.optional:
        return job

    decided = asked.model_copy(update={"optional": False})
    why = ""
    for uniform in (asked.uniform, True):
        fitted = _cut(job, decided.model_copy(update={"uniform": uniform}))
        try:
            check_structure(fitted)
            for each in (fitted, *fitted.siblings):
                check_format(each)
        except UsageError as error:
            why = why or error.message
        else:
            notes = (f"all blocks get the same widths: {why}",) if why else ()
            return replace(fitted, notes=notes)

    parts = ", ".join(f"{part} {share:g}" for part, share in asked.keep.items())
    note = f"nothing is cut, though {parts} was proposed: {why}"
    return replace(_cut(job, decided.model_copy(update={"keep": {}})), notes=(note,))


def _cut(job: Job, structure: Structure) -> Job:
    recipe = job.recipe.model_copy(update={"structure": structure})
    return replace(job, recipe=recipe, resolved=job.model)


def check_structure(job: Job) -> None:
    """Refuse a cut that the model does not allow, before any work."""
    settings = job.structure
    for part in settings.parts:
        plugins.load("structures", part).check(job.checkpoint, settings)

    allocation = job.recipe.prune.allocation
    if "E" in settings.sizes and allocation != "uniform":
        raise UsageError(
            "allocation-with-experts",
            f"prune.allocation = {allocation!r} shares zeros out before it is known which experts"
            " stay",
            remedy='use allocation = "uniform", or leave out --keep experts',
        )


def check_format(job: Job) -> None:
    """Refuse a cut whose result the format of a job cannot hold, before any work."""
    settings, name = job.recipe.structure, job.recipe.export.format
    sizes, form = settings.sizes, export.load(name)
    cuts = list_parts(settings, "block").values()
    alike = [cut.layout(job.checkpoint.shape, 0, settings).alike for cut in cuts]
    is_uniform = settings.uniform or all(alike)
    why = form.refusal(job.checkpoint, sizes, is_uniform) if sizes else ""
    if not why:
        return

    remedy = "leave that part whole, or choose another target"
    if not settings.uniform and not form.refusal(job.checkpoint, sizes, True):
        remedy = "give all blocks the same widths: --set structure.uniform=true"
    raise UsageError(
        "format-cannot-hold-cut", f"{name} cannot hold what is left: {why}", remedy=remedy
    )


def expect_structure(checkpoint: Checkpoint, settings: Structure) -> Expected:
    """Return about what a cut will leave, which :func:`check_structure` has allowed."""
    from racdeploy.prune.structure.outline import list_rows

    dense = checkpoint.shape
    shape = expect_shape(dense, settings)
    tokens = dense.vocab_size
    for part, plugin in list_parts(settings, "folder").items():
        tokens = plugin.layout(dense, 0, settings).count(settings.share(part))

    sizes = _expect_sizes(checkpoint, shape, tokens)
    heads = shape.widths["num_key_value_heads"][0]
    kept = _make_kept(checkpoint, sum(sizes.values()), len(shape.blocks), heads, tokens)
    return Expected(kept, list_rows(dense, shape), sizes)


def plan_cut(job: Job) -> dict[str, Any]:
    """Return about what will be left of a job's model, and where its target proposed more."""
    plan: dict[str, Any] = {"note": "; ".join(job.hints)} if job.hints else {}
    expected = expect_structure(job.checkpoint, job.structure)
    kept = expected.kept
    if kept is None:
        return plan

    about = describe_kept(kept, expected.structure)
    return plan | {"parameters_left": kept.parameters, "keeps": f"about {about}"}


def measure_kept(dense: Checkpoint, pruned: Checkpoint) -> Kept | None:
    """Return what is left of a model; None where it has as many parameters as before."""
    shape = pruned.shape
    heads = shape.num_key_value_heads
    return _make_kept(dense, pruned.parameters, shape.block_count, heads, shape.vocab_size)


def _make_kept(
    dense: Checkpoint, parameters: int, blocks: int, key_value_heads: int, tokens: int
) -> Kept | None:
    if parameters == dense.parameters:
        return None

    shape = dense.shape
    return Kept(
        parameters=parameters,
        parameters_dense=dense.parameters,
        blocks=blocks,
        blocks_dense=shape.block_count,
        key_value_heads=key_value_heads,
        key_value_heads_dense=shape.num_key_value_heads,
        vocabulary=tokens,
        vocabulary_dense=shape.vocab_size,
    )


def expect_shape(dense: ModelShape, settings: Structure, spread: Spread | None = None) -> CutShape:
    """Return the shape that a cut leaves, as if the last blocks went and the others lost alike.

    ``spread`` changes how many units of a part each block keeps, of the same sum.
    """
    from racdeploy.prune.structure.outline import Outline, whole

    outline = whole(dense)
    for part, plugin in list_parts(settings, "model").items():
        count = plugin.layout(dense, 0, settings).count(settings.share(part))
        outline = Outline(tuple(range(count)), {})

    units = {}
    for part in list_parts(settings, "block"):
        layouts = outline.layouts(dense, part, settings)
        counts = keep_alike(layouts, settings.share(part), uniform=settings.uniform)
        is_free = not (settings.uniform or layouts[0].alike)
        units[part] = tuple(spread(counts, layouts) if spread and is_free else counts)

    return Outline(outline.blocks, units).shape(dense, settings)


def _expect_sizes(checkpoint: Checkpoint, shape: CutShape, tokens: int) -> dict[str, int]:
    family, vocabulary = checkpoint.family, checkpoint.shape.vocab_size
    sizes = {}

    for name, entry in checkpoint.entries.items():
        left: Sequence[int] = entry.shape

        block, inside = family.split_block(name)
        if block is not None:
            if block >= len(shape.sizes) or shape.removes(inside):
                continue
            if generalize(inside) in family.block_tensors:
                left = widths.shape(family, inside, shape.sizes[block])

        elif left[0] == vocabulary:
            left = (tokens, *left[1:])

        sizes[name] = math.prod(left)

    return sizes
