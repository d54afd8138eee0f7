"""Choose the codes of a number format while pruning compensates: the exporter then writes those very codes.

Slab by slab, the columns of a slab are rounded and those to come are solved again for what the rounding did. Then
every column is visited in turn, again and again: each weight moves to the grid point that is best while all others
stay, and each block's scale to the one that is best for its codes, so the layer-wise error falls with every step. The
weight of largest magnitude of each block keeps the code of largest magnitude at any scale: quantizing the result again
gives the same scale and codes. Knows of a format what :class:`racdeploy.quant.Grid` says, and no file's layout.
Source: QuantEase (arXiv 2309.01885) on a mask, from the order of GPTQ (arXiv 2210.17323), with scales that move.
"""

from __future__ import annotations

import numpy as np
import torch

from racdeploy.prune.hessian import Hessian
from racdeploy.prune.refit import descend
from racdeploy.quant import Grid

__all__ = ["choose_codes", "round_to_grid"]

SLABS, DESCENT_STEPS = 8, 4
SWEEPS, COLUMNS = 8, 128
SCALES_SETTLE = 2  # sweeps before the end that leave the scales alone
SPANS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
_CHUNK_WEIGHTS = 1 << 18  # of a scale search at a time: a few arrays of them stay near a core


def round_to_grid(
    weight_OI: torch.Tensor, keep_OI: torch.Tensor, target_OI: torch.Tensor, hessian: Hessian, quant: Grid
) -> torch.Tensor:
    """Return weights that ``quant`` stores exactly, zero off the mask.

    Args:
        weight_OI: pruned weights in float32.
        keep_OI: the mask.
        target_OI: weights before pruning.
        hessian: of the input.
        quant: a number format whose codes are whole multiples of a block's scale.
    """
    code_OI, step_OB = choose_codes(weight_OI, keep_OI, target_OI, hessian, quant)
    return code_OI.mul_(step_OB.repeat_interleave(quant.BLOCK, dim=1))


def choose_codes(
    weight_OI: torch.Tensor, keep_OI: torch.Tensor, target_OI: torch.Tensor, hessian: Hessian, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return code_OI, whole numbers in float32, and step_OB, scales that half precision holds.

    Args:
        weight_OI: pruned weights in float32.
        keep_OI: the mask.
        target_OI: weights before pruning.
        hessian: of the input.
        quant: a number format whose codes are whole multiples of a block's scale.
    """
    search = _Search(weight_OI * keep_OI, keep_OI, target_OI, hessian.matrix_II, quant)
    inputs = weight_OI.shape[1]
    width = -(-inputs // (SLABS * quant.BLOCK)) * quant.BLOCK
    for start in range(0, inputs, width):
        search.solve_from(start)
        search.visit(start, min(start + width, inputs), scales=True)
    for sweep in range(SWEEPS):
        scales = sweep < SWEEPS - SCALES_SETTLE
        moved = search.visit(0, inputs, scales)
        if not moved and not scales:
            break
    return search.codes(), search.step_OB


class _Search:
    """Weights on their way to the grid, and the pull on each: minus half the slope of the layer-wise error.

    Args:
        weight_OI: pruned weights; overwritten.
        keep_OI: the mask.
        target_OI: weights before pruning.
        H_II: the Hessian.
        quant: the grid.
    """

    def __init__(
        self, weight_OI: torch.Tensor, keep_OI: torch.Tensor, target_OI: torch.Tensor, H_II: torch.Tensor, quant: Grid
    ) -> None:
        self.H_II, self.block, (self.low, self.high) = H_II, quant.BLOCK, quant.CODES
        self.step_OB, pinned_OI = _start_scales(weight_OI, H_II.diagonal(), quant)
        scaled_OI = (self.step_OB != 0).repeat_interleave(self.block, dim=1)
        self.free_OI = keep_OI & scaled_OI & (pinned_OI == 0)
        pinned_OI *= self.step_OB.repeat_interleave(self.block, dim=1)
        self.weight_OI = weight_OI.mul_(self.free_OI).add_(pinned_OI)
        self.pull_OI = (target_OI - self.weight_OI) @ H_II

    def solve_from(self, start: int) -> None:
        """Move the free weights from column ``start`` on, off the grid, to where the others pull them."""
        before_OI = self.weight_OI[:, start:].clone()
        H_II = self.H_II[start:, start:]
        descend(self.weight_OI[:, start:], self.pull_OI[:, start:], self.free_OI[:, start:], H_II, DESCENT_STEPS)
        self.pull_OI -= (self.weight_OI[:, start:] - before_OI) @ self.H_II[start:]

    def visit(self, start: int, stop: int, scales: bool) -> int:
        """Move each weight of the columns to its best grid point, and then each scale; return how many weights moved.

        What a move does to the pull on columns outside a chunk is made good once a chunk.
        """
        moved = 0
        for first in range(start, stop, COLUMNS):
            last = min(first + COLUMNS, stop)
            before_OC = self.weight_OI[:, first:last].clone()
            for block in range(first // self.block, last // self.block):
                moved += self._visit_block(block, first, last)
                if scales:
                    self._fit_scale(block, first, last)
            change_OC = self.weight_OI[:, first:last] - before_OC
            self.pull_OI[:, :first] -= change_OC @ self.H_II[first:last, :first]
            self.pull_OI[:, last:] -= change_OC @ self.H_II[first:last, last:]
        return moved

    def codes(self) -> torch.Tensor:
        """Return code_OI."""
        step_OI = self._divisor(slice(None)).repeat_interleave(self.block, dim=1)
        return (self.weight_OI / step_OI).round_()

    def _visit_block(self, block: int, first: int, last: int) -> int:
        step_O, moved = self._divisor(block), 0
        for column in range(block * self.block, (block + 1) * self.block):
            best_O = self.weight_OI[:, column] + self.pull_OI[:, column] / self.H_II[column, column]
            code_O = (best_O / step_O).round_().clamp_(self.low, self.high)
            change_O = (code_O * step_O - self.weight_OI[:, column]) * self.free_OI[:, column]
            self.weight_OI[:, column] += change_O
            self.pull_OI[:, first:last] -= torch.outer(change_O, self.H_II[column, first:last])
            moved += int(torch.count_nonzero(change_O))
        return moved

    def _fit_scale(self, block: int, first: int, last: int) -> None:
        """Move a block's scales to the best ones for its codes, where half precision holds a better one."""
        own = slice(block * self.block, (block + 1) * self.block)
        step_O = self.step_OB[:, block]
        code_OK = (self.weight_OI[:, own] / self._divisor(block)[:, None]).round_()
        pull_O = (code_OK * self.pull_OI[:, own]).sum(1)
        curve_O = ((code_OK @ self.H_II[own, own]) * code_OK).sum(1)
        fitted_O = (step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)).half().float()
        change_O = fitted_O - step_O
        better_O = (fitted_O * step_O > 0) & fitted_O.isfinite() & (change_O * (2 * pull_O - change_O * curve_O) > 0)
        change_O = torch.where(better_O, change_O, 0)
        self.step_OB[:, block] += change_O
        changed_OK = self.step_OB[:, block, None] * code_OK
        change_OK = changed_OK - self.weight_OI[:, own]
        self.weight_OI[:, own] = changed_OK
        self.pull_OI[:, first:last] -= change_OK @ self.H_II[own, first:last]

    def _divisor(self, block: int | slice) -> torch.Tensor:
        """Return the scales of a block, 1 for those that are zero: their weights are zero too."""
        step_O = self.step_OB[:, block]
        return torch.where(step_O == 0, 1, step_O)


def _start_scales(weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step_OB and pinned_OI, the code of each block's weight of largest magnitude and 0 elsewhere.

    Of the scales that are SPANS of what the format would choose, a block takes that of the least squared error, each
    weighted with the energy of its input.
    """
    widest_OB, pinned_OI = _widest(weight_OI, quant)
    step_OB = torch.empty_like(widest_OB)
    rows = max(_CHUNK_WEIGHTS // weight_OI.shape[1], 1)
    for start in range(0, len(weight_OI), rows):
        own = slice(start, start + rows)
        blocks = (len(widest_OB[own]), -1, quant.BLOCK)
        weight_OBK, pinned_OBK = weight_OI[own].view(blocks), pinned_OI[own].view(blocks)
        error_OB = torch.full_like(widest_OB[own], torch.inf)
        for span in SPANS:
            tried_OB = (widest_OB[own] * span).half().float()
            code_OBK = (weight_OBK / torch.where(tried_OB == 0, 1, tried_OB)[:, :, None]).round_()
            code_OBK = torch.where(pinned_OBK == 0, code_OBK.clamp_(*quant.CODES), pinned_OBK)
            off_OBK = code_OBK.mul_(tried_OB[:, :, None]).sub_(weight_OBK).square_()
            tried_error_OB = off_OBK.mul_(diagonal_I.view(1, -1, quant.BLOCK)).sum(2)
            better_OB = tried_error_OB < error_OB
            error_OB = torch.where(better_OB, tried_error_OB, error_OB)
            step_OB[own] = torch.where(better_OB, tried_OB, step_OB[own])
    return step_OB, pinned_OI


def _widest(weight_OI: torch.Tensor, quant: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step_OB, the scales that the format would choose, and pinned_OI, the codes that made them.

    Once is enough but for weights so small that half precision has few digits for their scale. There the scale may
    shrink with every turn, and never grows.
    """
    O, I = weight_OI.shape
    before_OI = weight_OI.cpu().numpy()
    while True:
        packed_OP = quant.quantize(before_OI)
        settled_OI = quant.dequantize(packed_OP, I)
        if np.array_equal(settled_OI, before_OI, equal_nan=True):
            break
        before_OI = settled_OI
    step_OB = torch.from_numpy(quant.steps(packed_OP).copy()).to(weight_OI.device)
    settled_OBK = torch.from_numpy(settled_OI.copy()).to(weight_OI.device).view(O, -1, quant.BLOCK)
    code_OBK = settled_OBK / torch.where(step_OB == 0, 1, step_OB)[:, :, None]
    extreme_OB1 = code_OBK.abs().argmax(2, keepdim=True)
    pinned_OBK = torch.zeros_like(code_OBK).scatter_(2, extreme_OB1, code_OBK.gather(2, extreme_OB1).round_())
    return step_OB, pinned_OBK.view(O, I)
