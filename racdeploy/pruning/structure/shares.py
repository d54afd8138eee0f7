"""Shares of a structure's units: those that blocks can keep, and those that are refused."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.pruning.structure.input_widths import (
    MIN_INPUTS,
    DescribeUnits,
    find_narrow_linear,
    list_layouts,
)
from racdeploy.pruning.structure.layout import (
    UnitLayout,
    check_cuttable,
    find_consumer,
    part_error,
)
from racdeploy.pruning.structures import list_parts
from racdeploy.recipe import Structure

_MAX_SHARE_GAP = 0.04
"""A share is refused if the nearest possible one differs by more than this, or a quarter of it."""


def check_share(
    part: str, layout: DescribeUnits, checkpoint: Checkpoint, structure: Structure
) -> None:
    """Refuse a share that no number of units comes near to, or that removes nothing.

    :func:`check_input_widths` refuses shares that leave linears too few inputs.
    """
    shape = checkpoint.shape
    check_cuttable(part, shape.family)
    layouts = [layout(shape, block, structure) for block in range(shape.block_count)]
    share = structure.kept_share(part)
    first = list_layouts(shape, [0], layout, structure)[0]
    uniform = structure.uniform or first.is_uniform

    if not find_consumer(shape, first.letter):
        raise part_error(part, shape.family, "no linear of every block takes them as its inputs")

    if (first.letter,) in shape.family.axes.values():
        raise part_error(part, shape.family, "a norm over those that stay would differ")

    nearest = nearest_share(layouts, share, uniform=structure.uniform)

    if is_far(nearest, share):
        where = "every block keeps as many" if uniform else "blocks differ"
        minimum = f" from {first.min_count} on" if first.min_count > first.step else ""
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} keeps {share * first.units:.4g} of {first.units} in a block, and"
            f" only multiples of {first.step}{minimum} can stay ({where})",
            remedy=_suggest_shares(part, first),
        )

    if share < 1 and nearest == 1:
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} removes nothing: {first.step} of {first.units} go at a time",
            remedy=_suggest_shares(part, first),
        )


def check_input_widths(shape: ModelShape, structure: Structure) -> None:
    """Refuse a cut that would leave a linear fewer than MIN_INPUTS inputs, in any structure.

    Without this check the walk would keep more units than the recipe asks for.
    """
    blocks = range(shape.block_count)
    for part, plugin in list_parts(structure, "block").items():
        share = structure.kept_share(part)
        layouts = [plugin.layout(shape, block, structure) for block in blocks]
        counts = nearest_counts(layouts, share, uniform=structure.uniform)
        narrow = _list_narrow_linears(shape, layouts, counts)
        if not narrow:
            continue

        # Blocks that keep some units more are as good as the share itself.
        allowed = list_layouts(shape, blocks, plugin.layout, structure)
        nearest = nearest_share(allowed, share, uniform=structure.uniform)
        if nearest == 1 or is_far(nearest, share):
            raise UsageError(
                "linear-too-narrow",
                f"{part} = {share:g} leaves {narrow[0]} fewer than {MIN_INPUTS} inputs, which"
                " llama.cpp computes wrongly on processors with AMX",
                remedy=_suggest_shares(part, allowed[0]),
            )


def _list_narrow_linears(
    shape: ModelShape, layouts: Sequence[UnitLayout], counts: Sequence[int]
) -> list[str]:
    """Return a linear of each block that these counts leave too few inputs."""
    narrow = []
    for block, (layout, count) in enumerate(zip(layouts, counts, strict=True)):
        cut_sizes = {**shape.sizes[block], **layout.sizes(count)}
        if linear := find_narrow_linear(shape, block, cut_sizes):
            narrow.append(f"{shape.family.blocks}.{block}.{linear}")
    return narrow


def _suggest_shares(part: str, layout: UnitLayout) -> str:
    """Return the remedy for a share that a layout does not allow."""
    shares = [f"{count / layout.units:.3g}" for count in layout.counts[1:9]]
    return f"choose one of {', '.join(shares)}" if shares else f"leave out --keep {part}"


def is_far(nearest: float, share: float) -> bool:
    """Return True if rounding a share to what blocks can keep would change it noticeably."""
    return abs(nearest - share) > min(_MAX_SHARE_GAP, share / 4)


def nearest_share(layouts: Sequence[UnitLayout], share: float, *, uniform: bool) -> float:
    """Return the share of all units that :func:`nearest_counts` keeps."""
    counts = nearest_counts(layouts, share, uniform=uniform)
    return sum(counts) / sum(layout.units for layout in layouts)


def nearest_counts(layouts: Sequence[UnitLayout], share: float, *, uniform: bool) -> list[int]:
    """Return the number of units per block that is nearest to a share, in each or in total.

    ``uniform``: the same share of every block. Otherwise only the total has to be near, and the
    last blocks make up the difference.
    """
    counts = [layout.nearest_count(share) for layout in layouts]

    if uniform or layouts[0].is_uniform:
        return counts

    # One step at a time towards the total, from the last block that can take it.
    wanted = share * sum(layout.units for layout in layouts)
    for index in reversed(range(len(layouts))):
        missing = wanted - sum(counts) + counts[index]
        counts[index] = min(layouts[index].counts, key=lambda count: abs(count - missing))

    return counts
