"""Optimized rounding: choose a format's codes for the least output error; the exporter packs them.

Columns are rounded slab by slab, and the later ones solved again in between. Then come sweeps of
coordinate descent: each weight moves to its best grid point with all others fixed, and each group's
step to the best one for its codes.
Source: QuantEase (arXiv 2309.01885) on a mask, with GPTQ's order (arXiv 2210.17323) and movable
scales.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.asymmetric import (
    fit_steps_and_minima,
    search_free,
    search_steps_and_minima,
)
from racdeploy.pruning.weights.refit import conjugate_gradient
from racdeploy.pruning.weights.scales import (
    ColumnGroup,
    Levels,
    nearest_scales,
    nearest_steps,
    ones_for_zeros,
    search_by_rows,
    search_steps,
)
from racdeploy.quant.grid import Grid, GridCodes

SLABS, DESCENT_STEPS = 8, 4  # more of either lower a linear's error by less than 1 %
SCALE_SWEEPS, CODE_SWEEPS = 4, 4
CHUNK_COLUMNS = 128  # visited on a transposed copy; other gradients are updated once a chunk


def round_to_grid(
    pruned: PrunedWeights,
    target_OI: Tensor,
    hessian: Hessian,
    grid: Grid,
    order_I: Tensor | None = None,
    factor_X1: Tensor | None = None,
) -> tuple[Tensor, GridCodes]:
    """Return the weights as the format stores them, zero outside the mask, and their codes.

    Args:
        pruned: initial weights, and the mask.
        target_OI: weights before pruning.
        hessian: of their inputs.
        grid: of the number format.
        order_I: column at each position of the file, whose neighbours share a step, and in which
            the codes are returned; None if the file has them in the model's order.
        factor_X1: of the rows in the file, whose codes are chosen: (O, 1) or (1, 1).
    """
    if factor_X1 is not None:
        pruned = PrunedWeights(pruned.weight_OI * factor_X1, pruned.keep_OI)
        target_OI = target_OI * factor_X1

    H_II = hessian.matrix_II
    if order_I is not None:
        pruned = PrunedWeights(pruned.weight_OI[:, order_I], pruned.keep_OI[:, order_I])
        target_OI = target_OI[:, order_I]
        H_II = H_II[order_I][:, order_I]

    search = _choose_search(grid, pruned)(pruned, target_OI, H_II, grid)
    search.descend()
    codes = search.read_codes()

    weight_OI = torch.from_numpy(grid.decode(codes)).to(target_OI.device)
    if order_I is not None:
        weight_OI = weight_OI[:, order_I.argsort()]
    if factor_X1 is not None:
        weight_OI = weight_OI / factor_X1
    return weight_OI, codes


def _choose_search(grid: Grid, pruned: PrunedWeights) -> type[_Search]:
    if grid.minimum_codes is None:
        return _Search
    if grid.step_codes is None:
        return _ZeroPointSearch
    # Zeros need a minimum that is a whole number of steps.
    return _LineSearch if pruned.keep_OI.all() else _ShiftedSearch


class _Search:
    """Weights that move to the grid, and the pull on each: the negative half gradient."""

    def __init__(self, pruned: PrunedWeights, target_OI: Tensor, H_II: Tensor, grid: Grid) -> None:
        self.H_II = H_II
        self.target_OI = target_OI
        self.grid = grid
        self.S = grid.group_size
        self.levels = Levels(grid)
        weight_OI = pruned.weight_OI * pruned.keep_OI
        self._start(weight_OI)

        has_scale_OI = (self.step_OG != 0).repeat_interleave(self.S, dim=1)
        self.free_OI = pruned.keep_OI & has_scale_OI
        self.weight_OI = weight_OI.mul_(self.free_OI)
        self.pull_OI = (target_OI - self.weight_OI) @ H_II

    def _start(self, weight_OI: Tensor) -> None:
        self.step_OG, self.unit_OG = search_steps(
            weight_OI, self.H_II.diagonal(), self.grid, self.levels
        )

    def read_codes(self) -> GridCodes:
        """Return the codes of the weights, and the numbers of their steps."""
        step_OI = ones_for_zeros(self.step_OG).repeat_interleave(self.S, dim=1)
        code_OI = self.levels.find_codes(self.weight_OI / step_OI)
        if self.grid.step_codes is None:
            return GridCodes(code_OI=_to_array(code_OI), scale_OX=_to_array(self.step_OG))

        return GridCodes(
            code_OI=_to_array(code_OI),
            scale_OX=_to_array(self._by_block(self.unit_OG)),
            step_code_OG=_to_array(_count_units(self.step_OG, self.unit_OG)),
        )

    def _by_block(self, value_OG: Tensor) -> Tensor:
        return value_OG[:, :: self.grid.block_size // self.S]

    def descend(self) -> None:
        """Round in slabs, then sweep over codes and scales, then over codes alone."""
        I = self.target_OI.shape[1]
        width = math.ceil(I / (SLABS * self.grid.block_size)) * self.grid.block_size

        for start in range(0, I, width):
            if start:
                # Solve the later weights off the grid. The pull on earlier columns becomes stale;
                # it is recomputed before these are visited again.
                conjugate_gradient(
                    self.weight_OI[:, start:],
                    self.pull_OI[:, start:],
                    free_OI=self.free_OI[:, start:],
                    H_II=self.H_II[start:, start:],
                    steps=DESCENT_STEPS,
                )

            self.visit(start, min(start + width, I), scales=True)

        gap_OI = self.target_OI - self.weight_OI
        torch.matmul(gap_OI, self.H_II, out=self.pull_OI)

        for _ in range(SCALE_SWEEPS):
            self.visit(0, I, scales=True)

        for _ in range(CODE_SWEEPS):
            moved = self.visit(0, I, scales=False)
            if not moved:
                break

    def visit(self, start: int, stop: int, scales: bool) -> bool:
        """Move weights, with ``scales`` steps too, to their best value; return if any moved."""
        moved = False
        for first in range(start, stop, CHUNK_COLUMNS):
            last = min(first + CHUNK_COLUMNS, stop)
            chunk = slice(first, last)

            # Work on whole columns: transpose once, so that a column is contiguous.
            weight_CO = _transpose(self.weight_OI[:, chunk])
            pull_CO = _transpose(self.pull_OI[:, chunk])
            free_CO = _transpose(self.free_OI[:, chunk])
            before_CO = weight_CO.clone()
            H_CC = self.H_II[chunk, chunk]

            for index in range(first // self.S, last // self.S):
                begin = index * self.S - first
                columns = slice(begin, begin + self.S)
                group = ColumnGroup(
                    index,
                    weight_SO=weight_CO[columns],
                    pull_SO=pull_CO[columns].clone(),
                    free_SO=free_CO[columns],
                    H_SS=H_CC[columns, columns],
                )
                self._move(group)
                if scales:
                    self._fit_steps(group)

                # Update the gradient of the chunk's other columns after every group …
                change_SO = group.weight_SO - before_CO[columns]
                pull_CO.addmm_(H_CC[:, columns], change_SO, alpha=-1)

            # … and that of the whole row after the chunk.
            change_CO = weight_CO - before_CO
            self.pull_OI.addmm_(change_CO.T, self.H_II[chunk], alpha=-1)
            self.weight_OI[:, chunk] = weight_CO.T
            moved |= bool(change_CO.any())

        return moved

    def _move(self, group: ColumnGroup) -> None:
        """Move a group's weights in place, column by column, and update the pull on them."""
        step_O = ones_for_zeros(self.step_OG[:, group.index])
        curve_S = group.H_SS.diagonal()
        columns = zip(group.weight_SO, group.pull_SO, group.free_SO, strict=True)

        for column, (weight_O, pull_O, free_O) in enumerate(columns):
            move_O = pull_O / curve_S[column]
            move_O += weight_O
            move_O = self._nearest(move_O.div_(step_O), group.index).mul_(step_O)
            move_O -= weight_O
            move_O *= free_O

            weight_O += move_O
            group.pull_SO.addr_(group.H_SS[column], move_O, alpha=-1)

    def _nearest(self, ratio_O: Tensor, index: int) -> Tensor:
        """Return the nearest values of weights of a group, given in steps."""
        return self.levels.round_(ratio_O)

    def _fit_steps(self, group: ColumnGroup) -> None:
        """Move a group's steps in place to the best ones of the format for its codes."""
        step_O = self.step_OG[:, group.index]
        value_SO = group.weight_SO / ones_for_zeros(step_O)
        if self.levels.is_uniform:
            value_SO.round_()
        pull_O = (value_SO * group.pull_SO).sum(0)
        curve_O = ((group.H_SS @ value_SO) * value_SO).sum(0)

        # The error is quadratic in the step: take its minimum, rounded, if the error falls.
        best_O = step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)
        fitted_O = nearest_steps(best_O, self.unit_OG[:, group.index], self.grid)
        change_O = fitted_O - step_O
        falls_O = change_O * (2 * pull_O - change_O * curve_O) > 0
        same_sign_O = fitted_O * step_O > 0
        better_O = same_sign_O & fitted_O.isfinite() & falls_O

        step_O += torch.where(better_O, change_O, 0)
        torch.mul(value_SO, step_O, out=group.weight_SO)


class _ShiftedSearch(_Search):
    """Search for asymmetric formats with zeros: a group's minimum is the middle code's value."""

    def _start(self, weight_OI: Tensor) -> None:
        self.middle = len(self.grid.values) // 2
        self.levels = Levels(self.grid, shift=self.middle)
        super()._start(weight_OI)

    def read_codes(self) -> GridCodes:
        codes = super().read_codes()
        minimum_scale_OX = codes.scale_OX * np.float32(self.middle)
        return replace(codes, minimum_code_OG=codes.step_code_OG, minimum_scale_OX=minimum_scale_OX)


class _ZeroPointSearch(_Search):
    """Search for formats whose groups have a code for zero, chosen once."""

    def _start(self, weight_OI: Tensor) -> None:
        assert self.grid.minimum_codes
        search = partial(search_free, grid=self.grid)
        step_OG, minimum_OG = search_by_rows(search, weight_OI, self.H_II.diagonal(), self.grid)
        self.zero_OG = (minimum_OG / ones_for_zeros(step_OG)).round_()
        self.zero_OG.clamp_(*self.grid.minimum_codes)
        self.step_OG = nearest_scales(step_OG, self.grid)
        self.unit_OG = torch.zeros_like(step_OG)

    def _nearest(self, ratio_O: Tensor, index: int) -> Tensor:
        zero_O = self.zero_OG[:, index]
        return torch.clamp(ratio_O.round_(), -zero_O, self.grid.values[-1] - zero_O)

    def read_codes(self) -> GridCodes:
        step_OI = ones_for_zeros(self.step_OG).repeat_interleave(self.S, dim=1)
        zero_OI = self.zero_OG.repeat_interleave(self.S, dim=1)
        code_OI = self.levels.find_codes(self.weight_OI / step_OI + zero_OI)
        # A block is one group, and its minimum is a whole number of steps.
        scale_OX = _to_array(self.step_OG)
        return GridCodes(
            code_OI=_to_array(code_OI),
            scale_OX=scale_OX,
            minimum_code_OG=_to_array(self.zero_OG.to(torch.int16)),
            minimum_scale_OX=scale_OX,
        )


class _LineSearch(_Search):
    """Search for asymmetric formats without zeros: each group has any minimum."""

    def _start(self, weight_OI: Tensor) -> None:
        self.steps = search_steps_and_minima(weight_OI, self.H_II.diagonal(), self.grid)
        self.step_OG = self.steps.step_OG  # the same tensor: both see a step that moves
        self.unit_OG = self.steps.step_unit_OG

    def read_codes(self) -> GridCodes:
        steps = self.steps
        step_OI = steps.step_OG.repeat_interleave(self.S, dim=1)
        minimum_OI = steps.minimum_OG.repeat_interleave(self.S, dim=1)
        code_OI = self.levels.find_codes((self.weight_OI + minimum_OI) / ones_for_zeros(step_OI))

        return GridCodes(
            code_OI=_to_array(code_OI),
            scale_OX=_to_array(self._by_block(steps.step_unit_OG)),
            step_code_OG=_to_array(_count_units(steps.step_OG, steps.step_unit_OG)),
            minimum_code_OG=_to_array(_count_units(steps.minimum_OG, steps.minimum_unit_OG)),
            minimum_scale_OX=_to_array(self._by_block(steps.minimum_unit_OG)),
        )

    def _move(self, group: ColumnGroup) -> None:
        minimum_O = self.steps.minimum_OG[:, group.index]
        weight_SO = group.weight_SO
        weight_SO += minimum_O
        super()._move(group)
        weight_SO -= minimum_O

    def _fit_steps(self, group: ColumnGroup) -> None:
        fit_steps_and_minima(group, self.steps, self.grid)


def _count_units(value_OG: Tensor, unit_OG: Tensor) -> Tensor:
    return (value_OG / ones_for_zeros(unit_OG)).round_().to(torch.int16)


def _transpose(values_OC: Tensor) -> Tensor:
    return values_OC.T.clone(memory_format=torch.contiguous_format)


def _to_array(value_OX: Tensor) -> NDArray[Any]:
    return value_OX.contiguous().cpu().numpy()
