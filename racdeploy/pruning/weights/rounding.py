"""Optimized rounding: choose a format's codes for the least output error; the exporter writes them.

Columns are rounded slab by slab, and the later ones solved again in between. Then come sweeps of
coordinate descent: each weight moves to its best grid point with all others fixed, and each group's
step to the best one for its codes. Codes pinned by :mod:`racdeploy.pruning.weights.scales` are
fixed, so that quantizing the result again gives the same codes.
Source: QuantEase (arXiv 2309.01885) on a mask, with GPTQ's order (arXiv 2210.17323) and movable
scales.
"""

from __future__ import annotations

import math
from typing import cast

import torch

from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.asymmetric import fit_steps_and_minima, search_steps_and_minima
from racdeploy.pruning.weights.refit import conjugate_gradient
from racdeploy.pruning.weights.scales import nearest_steps, ones_for_zeros, search_steps
from racdeploy.quant import AsymmetricGrid, Grid, is_asymmetric, signed_code_range

SLABS, DESCENT_STEPS = 8, 4  # more of either lower a linear's error by less than 1 %
SCALE_SWEEPS, CODE_SWEEPS = 4, 4
CHUNK_COLUMNS = 128  # visited on a transposed copy; other gradients are updated once a chunk


def round_to_grid(
    pruned: PrunedWeights,
    target_OI: torch.Tensor,
    hessian: Hessian,
    quant: Grid,
    order_I: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return weights that ``quant`` stores exactly, zero outside the mask.

    Args:
        pruned: initial weights, and the mask.
        target_OI: weights before pruning.
        hessian: of their inputs.
        quant: the format.
        order_I: column at each position of the file, whose neighbours share a step; None if the
            file has them in the model's order.
    """
    H_II = hessian.matrix_II
    if order_I is not None:
        pruned = PrunedWeights(pruned.weight_OI[:, order_I], pruned.keep_OI[:, order_I])
        target_OI = target_OI[:, order_I]
        H_II = H_II[order_I][:, order_I]

    chosen_OI = _choose(pruned, target_OI, H_II, quant)
    if order_I is None:
        return chosen_OI
    return chosen_OI[:, order_I.argsort()]


def _choose(
    pruned: PrunedWeights, target_OI: torch.Tensor, H_II: torch.Tensor, quant: Grid
) -> torch.Tensor:
    if is_asymmetric(quant) and pruned.keep_OI.all():
        lines = _LineSearch(pruned, target_OI, H_II, cast(AsymmetricGrid, quant))
        _descend(lines)
        return lines.on_grid()

    code_OI, step_OG = find_codes(pruned, target_OI, H_II, quant)
    step_OI = step_OG.repeat_interleave(quant.GROUP_SIZE, dim=1)
    return code_OI.mul_(step_OI)


def find_codes(
    pruned: PrunedWeights, target_OI: torch.Tensor, H_II: torch.Tensor, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return code_OI, integers in float32 with 0 for zero, and step_OG, exact in the format."""
    search = _Search(pruned, target_OI, H_II, quant)
    _descend(search)
    step_OI = ones_for_zeros(search.step_OG).repeat_interleave(quant.GROUP_SIZE, dim=1)
    code_OI = (search.weight_OI / step_OI).round_()
    return code_OI, search.step_OG


def _descend(search: _Search) -> None:
    """Round in slabs, then sweep over codes and scales, then over codes alone."""
    quant = search.quant
    I = search.target_OI.shape[1]
    width = math.ceil(I / (SLABS * quant.BLOCK_SIZE)) * quant.BLOCK_SIZE

    for start in range(0, I, width):
        if start:
            search.solve_from(start)

        search.visit(start, min(start + width, I), scales=True)

    gap_OI = search.target_OI - search.weight_OI
    torch.matmul(gap_OI, search.H_II, out=search.pull_OI)

    for _ in range(SCALE_SWEEPS):
        search.visit(0, I, scales=True)

    for _ in range(CODE_SWEEPS):
        moved = search.visit(0, I, scales=False)
        if not moved:
            break


class _Search:
    """Weights that move to the grid, and the pull on each: the negative half gradient."""

    def __init__(
        self, pruned: PrunedWeights, target_OI: torch.Tensor, H_II: torch.Tensor, quant: Grid
    ) -> None:
        self.H_II, self.target_OI = H_II, target_OI
        self.S, self.quant, self.codes = quant.GROUP_SIZE, quant, signed_code_range(quant)
        weight_OI = pruned.weight_OI * pruned.keep_OI
        self._start(weight_OI, pruned.keep_OI)

    def _start(self, weight_OI: torch.Tensor, keep_OI: torch.Tensor) -> None:
        H_II = self.H_II
        quant = self.quant
        self.step_OG, self.unit_OG, pinned_OI = search_steps(weight_OI, H_II.diagonal(), quant)

        has_scale_OI = (self.step_OG != 0).repeat_interleave(self.S, dim=1)
        self.free_OI = keep_OI & has_scale_OI & (pinned_OI == 0)
        pinned_OI *= self.step_OG.repeat_interleave(self.S, dim=1)
        self.weight_OI = weight_OI.mul_(self.free_OI).add_(pinned_OI)
        self.pull_OI = (self.target_OI - self.weight_OI) @ H_II

    def solve_from(self, start: int) -> None:
        """Solve the free weights from ``start`` on, off the grid.

        The pull on earlier columns becomes stale; it is recomputed before these are visited again.
        """
        weight_OC, pull_OC = self.weight_OI[:, start:], self.pull_OI[:, start:]
        H_CC = self.H_II[start:, start:]
        conjugate_gradient(weight_OC, pull_OC, self.free_OI[:, start:], H_CC, DESCENT_STEPS)

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
                group = slice(begin, begin + self.S)
                H_SS = H_CC[group, group]

                weight_SO = weight_CO[group]
                pull_SO = pull_CO[group].clone()
                self._visit_group(index, weight_SO, pull_SO, free_CO[group], H_SS, scales)

                # Update the gradient of the chunk's other columns after every group …
                change_SO = weight_SO - before_CO[group]
                pull_CO.addmm_(H_CC[:, group], change_SO, alpha=-1)

            # … and that of the whole row after the chunk.
            change_CO = weight_CO - before_CO
            self.pull_OI.addmm_(change_CO.T, self.H_II[chunk], alpha=-1)
            self.weight_OI[:, chunk] = weight_CO.T
            moved |= bool(change_CO.any())

        return moved

    def _visit_group(
        self,
        index: int,
        weight_SO: torch.Tensor,
        pull_SO: torch.Tensor,
        free_SO: torch.Tensor,
        H_SS: torch.Tensor,
        scales: bool,
    ) -> None:
        """Move a group's weights in place, and with ``scales`` also its steps."""
        step_O = self.step_OG[:, index]
        self._move(weight_SO, pull_SO, free_SO, H_SS, ones_for_zeros(step_O))
        if scales:
            self._fit_steps(weight_SO, pull_SO, H_SS, step_O, self.unit_OG[:, index])

    def _move(
        self,
        weight_SO: torch.Tensor,
        pull_SO: torch.Tensor,
        free_SO: torch.Tensor,
        H_SS: torch.Tensor,
        step_O: torch.Tensor,
    ) -> None:
        """Move a group's weights in place, column by column, and update the pull on them."""
        curve_S = H_SS.diagonal()
        columns = zip(weight_SO, pull_SO, free_SO, H_SS, curve_S, strict=True)

        for weight_O, pull_O, free_O, H_S, curve in columns:
            move_O = pull_O / curve
            move_O += weight_O
            move_O.div_(step_O).round_()
            move_O.clamp_(*self.codes).mul_(step_O)
            move_O -= weight_O
            move_O *= free_O

            weight_O += move_O
            pull_SO.addr_(H_S, move_O, alpha=-1)

    def _fit_steps(
        self,
        weight_SO: torch.Tensor,
        pull_SO: torch.Tensor,
        H_SS: torch.Tensor,
        step_O: torch.Tensor,
        unit_O: torch.Tensor,
    ) -> None:
        """Move a group's steps in place to the best ones of the format for its codes."""
        code_SO = (weight_SO / ones_for_zeros(step_O)).round_()
        pull_O = (code_SO * pull_SO).sum(0)
        curve_O = ((H_SS @ code_SO) * code_SO).sum(0)

        # The error is quadratic in the step: take its minimum, rounded, if the error falls.
        best_O = step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)
        fitted_O = nearest_steps(best_O, unit_O, self.quant)
        change_O = fitted_O - step_O
        falls_O = change_O * (2 * pull_O - change_O * curve_O) > 0
        same_sign_O = fitted_O * step_O > 0
        better_O = same_sign_O & fitted_O.isfinite() & falls_O

        step_O += torch.where(better_O, change_O, 0)
        torch.mul(code_SO, step_O, out=weight_SO)


class _LineSearch(_Search):
    """Search for asymmetric formats: each group has a minimum, too, and no weight must be zero."""

    quant: AsymmetricGrid

    def _start(self, weight_OI: torch.Tensor, keep_OI: torch.Tensor) -> None:
        lines = search_steps_and_minima(weight_OI, self.H_II.diagonal(), self.quant)
        self.codes = self.quant.CODE_RANGE
        self.step_OG, self.minimum_OG, self.unit_OG = lines

        self.free_OI = (self.step_OG != 0).repeat_interleave(self.S, dim=1)
        self.weight_OI = weight_OI.mul_(self.free_OI)
        self.pull_OI = (self.target_OI - self.weight_OI) @ self.H_II

    def on_grid(self) -> torch.Tensor:
        """Return the weights as the format decodes them, bit for bit."""
        step_OI, minimum_OI = (
            each_OG.repeat_interleave(self.S, dim=1) for each_OG in (self.step_OG, self.minimum_OG)
        )
        code_OI = ((self.weight_OI + minimum_OI) / ones_for_zeros(step_OI)).round_()
        return code_OI.mul_(step_OI).sub_(minimum_OI)

    def _visit_group(
        self,
        index: int,
        weight_SO: torch.Tensor,
        pull_SO: torch.Tensor,
        free_SO: torch.Tensor,
        H_SS: torch.Tensor,
        scales: bool,
    ) -> None:
        step_O = self.step_OG[:, index]
        minimum_O = self.minimum_OG[:, index]
        weight_SO += minimum_O
        self._move(weight_SO, pull_SO, free_SO, H_SS, ones_for_zeros(step_O))
        weight_SO -= minimum_O

        if scales:
            unit_O = self.unit_OG[:, index]
            fit_steps_and_minima(weight_SO, pull_SO, H_SS, step_O, minimum_O, unit_O, self.quant)


def _transpose(values_OC: torch.Tensor) -> torch.Tensor:
    return values_OC.T.clone(memory_format=torch.contiguous_format)
