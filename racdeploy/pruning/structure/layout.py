"""Units of a structure in a block, and the numbers of them that can stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from racdeploy.errors import UsageError
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import KeptIndices, list_axes


@dataclass(frozen=True)
class UnitLayout:
    """Units of a structure in a block, each of which is kept or removed as a whole.

    Args:
        letter: size of the consuming linear's inputs, as in a family's shapes.
        units: number of units.
        widths: letter of a size → consecutive indices that one unit has along it.
        cohorts: equal runs of units, each of which loses the same number.
        step: the number of units that stay is a multiple of it.
        min_count: minimum number of units that stay; see
            :mod:`racdeploy.pruning.structure.input_widths`.
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

    def sizes(self, count: int) -> dict[str, int]:
        """Return the size of each letter if so many units stay."""
        return {letter: count * width for letter, width in self.widths.items()}

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
