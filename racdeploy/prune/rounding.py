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
SWEEPS, COLUMNS = 5, 128
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
        if start:
            search.solve_from(start)
        search.visit(start, min(start + width, inputs), scales=True)
    search.pull_anew()
    for left in reversed(range(SWEEPS)):
        search.visit(0, inputs, scales=left > 0)  # the last sweep is for the codes at the scales as they are
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
        self.target_OI, self.pull_OI = target_OI, (target_OI - self.weight_OI) @ H_II

    def solve_from(self, start: int) -> None:
        """Move the free weights from column ``start`` on, off the grid; the pull on those before is not kept up."""
        own = slice(start, None)
        descend(self.weight_OI[:, own], self.pull_OI[:, own], self.free_OI[:, own], self.H_II[own, own], DESCENT_STEPS)

    def pull_anew(self) -> None:
        """Compute the pull on every column."""
        torch.matmul(self.target_OI - self.weight_OI, self.H_II, out=self.pull_OI)

    def visit(self, start: int, stop: int, scales: bool) -> None:
        """Move each weight of the columns to its best grid point, and then each scale where wanted.

        A chunk of columns is worked on with each column in one piece; what its moves do to the pull on a block's
        neighbours is made good once a block, and on the other columns once a chunk.
        """
        for first in range(start, stop, COLUMNS):
            own = slice(first, min(first + COLUMNS, stop))
            weight_CO, pull_CO, free_CO = (
                values_OI[:, own].T.contiguous() for values_OI in (self.weight_OI, self.pull_OI, self.free_OI)
            )
            before_CO, H_CC = weight_CO.clone(), self.H_II[own, own]
            for row in range(0, len(weight_CO), self.block):
                block, step_O = slice(row, row + self.block), self.step_OB[:, (first + row) // self.block]
                weight_KO, H_KK = weight_CO[block], H_CC[block, block]
                pull_KO = self._move(weight_KO, pull_CO[block].clone(), free_CO[block], H_KK, _divisor(step_O))
                if scales:
                    _fit_scales(weight_KO, pull_KO, H_KK, step_O)
                pull_CO.addmm_(H_CC[:, block], weight_KO - before_CO[block], alpha=-1)
            self.weight_OI[:, own] = weight_CO.T
            self.pull_OI.addmm_((weight_CO - before_CO).T, self.H_II[own], alpha=-1)

    def codes(self) -> torch.Tensor:
        """Return code_OI."""
        return (self.weight_OI / _divisor(self.step_OB).repeat_interleave(self.block, dim=1)).round_()

    def _move(
        self,
        weight_KO: torch.Tensor,
        pull_KO: torch.Tensor,
        free_KO: torch.Tensor,
        H_KK: torch.Tensor,
        step_O: torch.Tensor,
    ) -> torch.Tensor:
        """Move the weights of a block, in place, one column after the other; return the pull on them then."""
        for weight_O, pull_O, free_O, H_K, curve in zip(
            weight_KO, pull_KO, free_KO, H_KK, H_KK.diagonal(), strict=True
        ):
            code_O = (weight_O + pull_O / curve).div_(step_O).round_().clamp_(self.low, self.high)
            change_O = code_O.mul_(step_O).sub_(weight_O).mul_(free_O)
            weight_O += change_O
            pull_KO.addr_(H_K, change_O, alpha=-1)
        return pull_KO


def _fit_scales(weight_KO: torch.Tensor, pull_KO: torch.Tensor, H_KK: torch.Tensor, step_O: torch.Tensor) -> None:
    """Move a block's scales, in place, to the best ones for its codes, where half precision holds a better one."""
    code_KO = (weight_KO / _divisor(step_O)).round_()
    pull_O = (code_KO * pull_KO).sum(0)
    curve_O = ((H_KK @ code_KO) * code_KO).sum(0)
    fitted_O = (step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)).half().float()
    change_O = fitted_O - step_O
    better_O = (fitted_O * step_O > 0) & fitted_O.isfinite() & (change_O * (2 * pull_O - change_O * curve_O) > 0)
    step_O += torch.where(better_O, change_O, 0)
    torch.mul(code_KO, step_O, out=weight_KO)


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """Return scales with 1 for those that are zero: their weights are zero too."""
    return torch.where(step == 0, 1, step)


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
            code_OBK = (weight_OBK / _divisor(tried_OB)[:, :, None]).round_()
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
    code_OBK = settled_OBK / _divisor(step_OB)[:, :, None]
    extreme_OB1 = code_OBK.abs().argmax(2, keepdim=True)
    pinned_OBK = torch.zeros_like(code_OBK).scatter_(2, extreme_OB1, code_OBK.gather(2, extreme_OB1).round_())
    return step_OB, pinned_OBK.view(O, I)
