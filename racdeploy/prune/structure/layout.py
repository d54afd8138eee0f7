"""What of a part of a block goes or stays as a whole, and how many of it can stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from racdeploy.errors import UsageError
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import Kept, axes
from racdeploy.recipe import Structure

FAR = 0.04
"""A share that no number of units comes nearer to than this, or a quarter of it, is refused."""


@dataclass(frozen=True)
class Layout:
    """What of a part of a block goes or stays as a whole.

    Args:
        letter: the size along which the linear's inputs lie, as in a family's shapes.
        units: how many there are.
        widths: letter → consecutive indices of one unit along it.
        cohorts: equal runs of units that each lose as many.
        step: numbers of units that stay are multiples of it.
        least: fewer units never stay, unless there were fewer.
        alike: whether as many must stay in every block.
    """

    letter: str
    units: int
    widths: Mapping[str, int]
    cohorts: int = 1
    step: int = 1
    least: int = 1
    alike: bool = False

    @property
    def counts(self) -> list[int]:
        """Numbers of units that can stay, from all to the least."""
        steps = range(self.step, self.units, self.step)
        return [self.units, *(count for count in reversed(steps) if count >= self.least)]

    def count(self, share: float) -> int:
        """Return how many units a share is; above 1 it is their number."""
        return int(share) if share > 1 else round(share * self.units)

    def nearest(self, share: float) -> int:
        """Return the count that is nearest to a share of all."""
        return min(self.counts, key=lambda count: abs(count - share * self.units))

    def indices(self, units: Sequence[int]) -> Kept:
        """Return what stays along each letter, of units that stay."""
        units_U1 = np.array(units, dtype=np.int64)[:, None]

        kept = {}
        for letter, width in self.widths.items():
            kept[letter] = (units_U1 * width + np.arange(width)).reshape(-1)
        return kept


def find_end(shape: ModelShape, letter: str) -> str:
    """Return the linear that alone has a size as its input, in every block, or an empty string."""
    family = shape.family
    for linears in shape.input_groups[0]:
        if len(linears) == 1 and axes(family, f"{linears[0]}.weight")[1] == letter:
            everywhere = all(family.has(kinds, linears[0]) for kinds in shape.kinds)
            return linears[0] if everywhere else ""
    return ""


def refuse_uncut(part: str, family: Family) -> None:
    """Refuse to leave out anything of a family that has to stay whole."""
    if family.uncut:
        raise refuse_part(part, family, family.uncut)


def refuse_part(part: str, family: Family, why: str) -> UsageError:
    """Return the error for a part that this architecture does not allow to cut."""
    return UsageError(
        "part-cannot-be-cut",
        f"{part} of {family.architecture} cannot be cut: {why}",
        remedy=f"leave out --keep {part}",
    )


def check_share(
    part: str,
    shape: ModelShape,
    layout: Callable[[ModelShape, int, Structure], Layout],
    structure: Structure,
) -> None:
    """Refuse a share that the units of a part cannot come near to, or that removes nothing."""
    refuse_uncut(part, shape.family)
    layouts = [layout(shape, block, structure) for block in range(shape.block_count)]
    share = structure.share(part)
    first = layouts[0]
    uniform = structure.uniform or first.alike

    if not find_end(shape, first.letter):
        raise refuse_part(part, shape.family, "no linear of every block collects them")

    if (first.letter,) in shape.family.shapes.values():
        raise refuse_part(part, shape.family, "a norm of what is left would be another")

    kept = sum(keep_alike(layouts, share, uniform=structure.uniform))
    units = sum(each.units for each in layouts)
    reachable = [f"{count / first.units:.3g}" for count in first.counts[:8]]

    if abs(kept / units - share) > min(FAR, share / 4):
        where = "every block keeps as many" if uniform else "blocks differ"
        least = ""
        if first.least > first.step:
            least = f" from {first.least} on"
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} keeps {share * first.units:.4g} of {first.units} in a block, and"
            f" only multiples of {first.step}{least} can stay ({where})",
            remedy=f"choose one of {', '.join(reachable)}",
        )

    if share < 1 and kept == units:
        raise UsageError(
            "share-not-reachable",
            f"{part} = {share:g} removes nothing: {first.step} of {first.units} go at a time",
            remedy=f"choose one of {', '.join(reachable[1:])}",
        )


def keep_alike(layouts: Sequence[Layout], share: float, *, uniform: bool) -> list[int]:
    """Return how many units of each block come nearest to a share: of each block, or in total.

    ``uniform``: as many in every block, also where the layout leaves a choice. Where only the total
    counts, the last blocks keep more.
    """
    counts = [layout.nearest(share) for layout in layouts]

    if uniform or layouts[0].alike:
        return counts

    # One step at a time towards the total, from the last block that can take it.
    wanted = share * sum(layout.units for layout in layouts)
    for place in reversed(range(len(layouts))):
        missing = wanted - sum(counts) + counts[place]
        counts[place] = min(layouts[place].counts, key=lambda count: abs(count - missing))

    return counts
