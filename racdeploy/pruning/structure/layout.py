"""Units of a structure in a block, and the numbers of them that can stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import KeptIndices, list_axes
from racdeploy.recipe import Structure

_MAX_SHARE_GAP = 0.04
"""A share is refused if the nearest possible one differs by more than this, or a quarter of it."""


@dataclass(frozen=True)
class UnitLayout:
    """Units of a structure in a block, each of which is kept or removed as a whole.

    Args:
        letter: size of the consuming linear's inputs, as in a family's shapes.
        units: number of units.
        widths: letter of a size → consecutive indices that one unit has along it.
        cohorts: equal runs of units, each of which loses the same number.
        step: the number of units that stay is a multiple of it.
        min_count: minimum number of units that stay, unless there were fewer.
        is_uniform: the same number must stay in every block.
    """

    letter: str
    units: int
    widths: Mapping[str, int]
    cohorts: int = 1
    step: int = 1
    min_count: int = 1
    is_uniform: bool = False

    @property
    def counts(self) -> list[int]:
        """Numbers of units that can stay, descending from all."""
        steps = range(self.step, self.units, self.step)
        return [self.units, *(count for count in reversed(steps) if count >= self.min_count)]

    def count(self, share: float) -> int:
        """Return the number of units of a share; above 1 the share is a number already."""
        return int(share) if share > 1 else round(share * self.units)

    def nearest_count(self, share: float) -> int:
        """Return the possible number of units that is nearest to a share."""
        return min(self.counts, key=lambda count: abs(count - share * self.units))

    def kept_indices(self, units: Sequence[int]) -> KeptIndices:
        """Return the indices that stay along each letter, for units that stay."""
        units_U1 = np.array(units, dtype=np.int64)[:, None]

        return {
            letter: (units_U1 * width + np.arange(width)).reshape(-1)
            for letter, width in self.widths.items()
        }


def find_consumer(shape: ModelShape, letter: str) -> str:
    """Return the only linear whose input has a size, in every block; empty if there is none."""
    family = shape.family
    for linears in shape.input_groups[0]:
        if len(linears) == 1 and list_axes(family, f"{linears[0]}.weight")[1] == letter:
            everywhere = all(family.has_tensor(kinds, linears[0]) for kinds in shape.kinds)
            return linears[0] if everywhere else ""
    return ""


def check_cuttable(part: str, family: Family) -> None:
    """Refuse a cut of a family that cannot be cut at all."""
    if family.no_cut_reason:
        raise part_error(part, family, family.no_cut_reason)


def part_error(part: str, family: Family, reason: str) -> UsageError:
    """Return the error for a structure that cannot be cut in this architecture."""
    return UsageError(
        "part-cannot-be-cut",
        f"{part} of {family.architecture} cannot be cut: {reason}",
        remedy=f"leave out --keep {part}",
    )


def check_share(
    part: str,
    layout: Callable[[ModelShape, int, Structure], UnitLayout],
    checkpoint: Checkpoint,
    structure: Structure,
) -> None:
    """Refuse a share that no number of units comes near to, or that removes nothing."""
    shape = checkpoint.shape
    check_cuttable(part, shape.family)
    layouts = [layout(shape, block, structure) for block in range(shape.block_count)]
    share = structure.kept_share(part)
    first = layouts[0]
    uniform = structure.uniform or first.is_uniform

    if not find_consumer(shape, first.letter):
        raise part_error(part, shape.family, "no linear of every block takes them as its inputs")

    if (first.letter,) in shape.family.axes.values():
        raise part_error(part, shape.family, "a norm over those that stay would differ")

    nearest = nearest_share(layouts, share, uniform=structure.uniform)
    reachable = [f"{count / first.units:.3g}" for count in first.counts[:8]]

    if is_far(nearest, share):
        where = "every block keeps as many" if uniform else "blocks differ"
        minimum = f" from {first.min_count} on" if first.min_count > first.step else ""
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} keeps {share * first.units:.4g} of {first.units} in a block, and"
            f" only multiples of {first.step}{minimum} can stay ({where})",
            remedy=f"choose one of {', '.join(reachable)}",
        )

    if share < 1 and nearest == 1:
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} removes nothing: {first.step} of {first.units} go at a time",
            remedy=f"choose one of {', '.join(reachable[1:])}",
        )


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
