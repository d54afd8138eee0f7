"""Initial steps (scales) of a format's groups for optimized rounding, and their possible values.

A step is a number that the format can store as a scale or, where groups share the scale of a quant
block, an integer multiple of it, the unit. The unit is chosen here and fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from racdeploy.quant.grid import Grid

# Steps to try, relative to the one that gives the largest weight the outermost value: smaller ones
# clip it, with larger ones it gets another value.
SPANS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
CHUNK_WEIGHTS = 1 << 18  # searched at a time: a few arrays of 1 MB fit a core's cache


class Levels:
    """Values of a grid's codes, in steps; ``shift`` is the value that stands for zero."""

    def __init__(self, grid: Grid, shift: float = 0.0) -> None:
        self.values = tuple(value - shift for value in grid.values)
        ordered = sorted(self.values)
        self.lowest, self.highest = ordered[0], ordered[-1]
        self.is_uniform = all(after - before == 1 for before, after in pairwise(ordered))
        self._ordered = torch.tensor(ordered)
        self._middles = (self._ordered[1:] + self._ordered[:-1]) / 2

    @property
    def outermost(self) -> float:
        """The value of largest magnitude."""
        return self.lowest if -self.lowest >= self.highest else self.highest

    def round_(self, ratio: Tensor) -> Tensor:
        """Return the nearest values; a uniform grid overwrites ``ratio``."""
        if self.is_uniform:
            return ratio.round_().clamp_(self.lowest, self.highest)
        self._ordered = self._ordered.to(ratio.device)
        self._middles = self._middles.to(ratio.device)
        return self._ordered[torch.bucketize(ratio, self._middles)]

    def find_codes(self, ratio: Tensor) -> Tensor:
        """Return the code of the nearest value, uint8."""
        if self.is_uniform and self.values[0] == self.lowest:
            return (ratio.round() - self.lowest).clamp(0, len(self.values) - 1).to(torch.uint8)
        order = sorted(range(len(self.values)), key=self.values.__getitem__)
        codes = torch.tensor(order, dtype=torch.uint8, device=ratio.device)
        return codes[torch.bucketize(ratio, self._middles.to(ratio.device))]


def search_steps(
    weight_OI: Tensor, diagonal_I: Tensor, grid: Grid, levels: Levels
) -> tuple[Tensor, Tensor]:
    """Search the step of each group with the least error, weighted by input energy.

    Args:
        diagonal_I: input energies, the diagonal of the Hessian.

    Returns:
        step_OG, and unit_OG for :func:`nearest_steps`.
    """

    def search(weight_OGS: Tensor, energy_1GS: Tensor) -> tuple[Tensor, Tensor]:
        return _Trial(weight_OGS, energy_1GS, grid, levels).run()

    step_OG, unit_OG = search_by_rows(search, weight_OI, diagonal_I, grid)
    return step_OG, unit_OG


def search_by_rows(
    search: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    weight_OI: Tensor,
    diagonal_I: Tensor,
    grid: Grid,
) -> list[Tensor]:
    """Return the results of ``search(weight_OGS, energy_1GS)``, called for a few rows at a time.

    All spans are tried while the arrays of these rows are in the cache.
    """
    O, I = weight_OI.shape
    weight_OGS = weight_OI.view(O, -1, grid.group_size)
    energy_1GS = diagonal_I.view(1, -1, grid.group_size)
    chunks = torch.split(weight_OGS, max(CHUNK_WEIGHTS // I, 1))
    results = [search(chunk_OGS, energy_1GS) for chunk_OGS in chunks]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def nearest_steps(step: Tensor, unit: Tensor, grid: Grid) -> Tensor:
    """Return the nearest steps that a format can store; ``unit`` is ignored without units."""
    if grid.step_codes is None:
        return nearest_scales(step, grid)

    number = step / ones_for_zeros(unit)
    return number.round_().clamp_(*grid.step_codes).mul_(unit)


def nearest_scales(scale: Tensor, grid: Grid) -> Tensor:
    """Return the nearest scales of quant blocks."""
    if grid.scale == "half":
        return scale.half().float()

    # Powers of two from 2**-128 to 2**127: the exponent's byte of a shared scale.
    exponent = ones_for_zeros(scale).abs().log2().round_().clamp_(-126, 127)
    return torch.where(scale == 0, 0, exponent.exp2())


def ones_for_zeros(step: Tensor) -> Tensor:
    """Return steps to divide by: 1 in place of 0, whose weights are zero too."""
    return torch.where(step == 0, 1, step)


def find_units(value_OG: Tensor, codes: tuple[int, int], grid: Grid) -> Tensor:
    """Return the unit of each group: the largest value of its block has the largest code."""
    groups = grid.block_size // grid.group_size
    value_OXG = value_OG.view(len(value_OG), -1, groups)  # X: blocks of a row
    index_OX1 = value_OXG.abs().argmax(2, keepdim=True)
    largest_OG = value_OXG.gather(2, index_OX1).expand_as(value_OXG).reshape(value_OG.shape)
    return (largest_OG / max(codes, key=abs)).half().float()


@dataclass(frozen=True)
class ColumnGroup:
    """Columns of a group while their codes are searched, transposed; they are moved in place.

    Args:
        index: of the group in its row.
        weight_SO: a view of the weights that are searched.
        pull_SO: negative half gradient of each weight, a copy of the group's own.
        free_SO: whether a weight may move.
        H_SS: Hessian of the group's inputs.
    """

    index: int
    weight_SO: Tensor
    pull_SO: Tensor
    free_SO: Tensor
    H_SS: Tensor


@dataclass(frozen=True)
class _Trial:
    """Rows whose steps are searched."""

    weight_OGS: Tensor
    energy_1GS: Tensor
    grid: Grid
    levels: Levels

    def run(self) -> tuple[Tensor, Tensor]:
        """Return step_OG and unit_OG."""
        index_OG1 = self.weight_OGS.abs().argmax(2, keepdim=True)
        largest_OG = self.weight_OGS.gather(2, index_OG1)[:, :, 0]
        widest_OG = largest_OG / self.levels.outermost
        if self.levels.lowest == -self.levels.highest:  # a step needs no sign
            widest_OG = widest_OG.abs()

        if self.grid.step_codes is None:
            none_OG = torch.zeros_like(widest_OG)
            return self._search(none_OG, widest_OG)[0], none_OG

        # The largest of the best free steps gives the unit, in which all steps are searched again.
        free_OG, _ = self._search(None, widest_OG)
        unit_OG = find_units(free_OG, self.grid.step_codes, self.grid)
        if self.grid.step_codes[0] < 0:
            return self._search(unit_OG, widest_OG)[0], unit_OG

        # Without signed step codes the unit has the sign: take the better one for all groups.
        size_OG = widest_OG.abs()
        unit_OG = unit_OG.abs()
        up_OG, lost_up_OG = self._search(unit_OG, size_OG)
        down_OG, lost_down_OG = self._search(-unit_OG, -size_OG)
        is_up_OX = self._sum_blocks(lost_up_OG) <= self._sum_blocks(lost_down_OG)
        is_up_OG = is_up_OX.repeat_interleave(widest_OG.shape[1] // is_up_OX.shape[1], dim=1)
        step_OG = torch.where(is_up_OG, up_OG, down_OG)
        unit_OG = torch.where(is_up_OG, unit_OG, -unit_OG)
        return step_OG, unit_OG

    def _sum_blocks(self, lost_OG: Tensor) -> Tensor:
        """Return the sum over the groups of each block."""
        groups = self.grid.block_size // self.grid.group_size
        return lost_OG.view(len(lost_OG), -1, groups).sum(2)

    def _search(self, unit_OG: Tensor | None, widest_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best step of each group and its error.

        Args:
            unit_OG: steps are multiples of it; None: any number.
            widest_OG: the steps that give the largest weight the outermost value.
        """
        best_OG = widest_OG.clone()
        lowest_error_OG = torch.full_like(best_OG, torch.inf)

        for span in SPANS:
            tried_OG = widest_OG * span
            if unit_OG is not None:
                tried_OG = nearest_steps(tried_OG, unit_OG, self.grid)

            lost_OGS = self.levels.round_(self.weight_OGS / ones_for_zeros(tried_OG)[:, :, None])
            lost_OGS = lost_OGS.mul_(tried_OG[:, :, None])
            lost_OGS -= self.weight_OGS
            error_OG = lost_OGS.square_().mul_(self.energy_1GS).sum(2)

            better_OG = error_OG < lowest_error_OG
            lowest_error_OG = torch.where(better_OG, error_OG, lowest_error_OG)
            best_OG = torch.where(better_OG, tried_OG, best_OG)

        return best_OG, lowest_error_OG
