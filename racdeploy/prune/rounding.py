"""Choose the codes of a number format while pruning compensates: the exporter then writes those very codes.

Slab by slab, the columns of a slab are rounded and those to come are solved again for what the rounding did. Then
every column is visited in turn, again and again, and the layer-wise error falls with every step: each weight moves to
the grid point that is best while all others stay, and each block's scale to the one that is best for its codes. The
weight of largest magnitude of each block keeps the code of largest magnitude at any scale: quantizing the result again
gives the same scale and codes. Knows of a format what :class:`racdeploy.quant.Grid` says, and no file's layout.
Source: QuantEase (arXiv 2309.01885) on a mask, from the order of GPTQ (arXiv 2210.17323), with scales that move.
"""

from __future__ import annotations

import torch

from racdeploy.prune.hessian import Hessian
from racdeploy.prune.refit import descend
from racdeploy.quant import Grid

SLABS, DESCENT_STEPS = 8, 4  # more lower the error of a linear by less than 1 %
SCALE_SWEEPS, CODE_SWEEPS = 4, 4
CHUNK_COLUMNS = 128
SPANS = (
    0.75,
    0.8,
    0.85,
    0.9,
    0.95,
    1.0,
    1.05,
)  # smaller ones clip, a larger one moves every code; 4 bits gain most
_CHUNK_WEIGHTS = 1 << 18  # of a scale search at a time: a few arrays of them stay near a core


def round_to_grid(
    weight_OI: torch.Tensor,
    keep_OI: torch.Tensor,
    target_OI: torch.Tensor,
    hessian: Hessian,
    quant: Grid,
) -> torch.Tensor:
    """Return weights that ``quant`` stores exactly, zero off the mask.

    Args:
        weight_OI: pruned weights in float32.
        keep_OI: the mask.
        target_OI: weights before pruning.
        hessian: of the input.
        quant: a number format whose codes are whole multiples of a block's scale.
    """
    code_OI, step_OB = find_codes(weight_OI, keep_OI, target_OI, hessian, quant)
    return code_OI.mul_(step_OB.repeat_interleave(quant.BLOCK, dim=1))


def find_codes(
    weight_OI: torch.Tensor,
    keep_OI: torch.Tensor,
    target_OI: torch.Tensor,
    hessian: Hessian,
    quant: Grid,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return code_OI, whole numbers in float32, and step_OB, scales that half precision holds.

    The arguments are those of :func:`round_to_grid`.
    """
    search = _Search(weight_OI * keep_OI, keep_OI, target_OI, hessian.matrix_II, quant)
    inputs = weight_OI.shape[1]
    width = -(-inputs // (SLABS * quant.BLOCK)) * quant.BLOCK
    for start in range(0, inputs, width):
        if start:
            search.solve_from(start)
        search.visit(start, min(start + width, inputs), scales=True)
    search.pull_anew()
    for _ in range(SCALE_SWEEPS):
        search.visit(0, inputs, scales=True)
    for _ in range(CODE_SWEEPS):
        if not search.visit(0, inputs, scales=False):
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
        self,
        weight_OI: torch.Tensor,
        keep_OI: torch.Tensor,
        target_OI: torch.Tensor,
        H_II: torch.Tensor,
        quant: Grid,
    ) -> None:
        self.H_II, self.quant_block, (self.low, self.high) = H_II, quant.BLOCK, quant.CODES
        self.step_OB, pinned_OI = _start_scales(weight_OI, H_II.diagonal(), quant)
        scaled_OI = (self.step_OB != 0).repeat_interleave(self.quant_block, dim=1)
        self.free_OI = keep_OI & scaled_OI & (pinned_OI == 0)
        pinned_OI *= self.step_OB.repeat_interleave(self.quant_block, dim=1)
        self.weight_OI = weight_OI.mul_(self.free_OI).add_(pinned_OI)
        self.target_OI, self.pull_OI = target_OI, (target_OI - self.weight_OI) @ H_II

    def solve_from(self, start: int) -> None:
        """Move the free weights from column ``start`` on, off the grid; the pull on those before is not kept up."""
        own = slice(start, None)
        descend(
            self.weight_OI[:, own],
            self.pull_OI[:, own],
            self.free_OI[:, own],
            self.H_II[own, own],
            DESCENT_STEPS,
        )

    def pull_anew(self) -> None:
        """Compute the pull on every column."""
        torch.matmul(self.target_OI - self.weight_OI, self.H_II, out=self.pull_OI)

    def visit(self, start: int, stop: int, scales: bool) -> bool:
        """Move each weight of the columns to its best grid point, and each scale where wanted; return if any moved.

        A chunk of columns is worked on with each column in one piece; what its moves do to the pull on a quant block's
        neighbours is made good once a block, and on the other columns once a chunk.
        """
        moved = False
        for first in range(start, stop, CHUNK_COLUMNS):
            chunk = slice(first, min(first + CHUNK_COLUMNS, stop))
            weight_CO, pull_CO, free_CO = (
                values_OI[:, chunk].T.clone(memory_format=torch.contiguous_format)
                for values_OI in (self.weight_OI, self.pull_OI, self.free_OI)
            )
            before_CO, H_CC = weight_CO.clone(), self.H_II[chunk, chunk]
            steps = self.step_OB[
                :, first // self.quant_block : chunk.stop // self.quant_block
            ].unbind(1)
            for index, step_O in enumerate(steps):
                block = slice(index * self.quant_block, (index + 1) * self.quant_block)
                weight_KO, H_KK = weight_CO[block], H_CC[block, block]
                pull_KO = self._move(
                    weight_KO, pull_CO[block].clone(), free_CO[block], H_KK, _divisor(step_O)
                )
                if scales:
                    _fit_scales(weight_KO, pull_KO, H_KK, step_O)
                pull_CO.addmm_(H_CC[:, block], weight_KO - before_CO[block], alpha=-1)
            change_CO = weight_CO - before_CO
            moved |= bool(change_CO.any())
            self.weight_OI[:, chunk] = weight_CO.T
            self.pull_OI.addmm_(change_CO.T, self.H_II[chunk], alpha=-1)
        return moved

    def codes(self) -> torch.Tensor:
        """Return code_OI."""
        return (
            self.weight_OI / _divisor(self.step_OB).repeat_interleave(self.quant_block, dim=1)
        ).round_()

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


def _fit_scales(
    weight_KO: torch.Tensor, pull_KO: torch.Tensor, H_KK: torch.Tensor, step_O: torch.Tensor
) -> None:
    """Move a block's scales, in place, to the best ones for its codes, where half precision holds a better one."""
    code_KO = (weight_KO / _divisor(step_O)).round_()
    pull_O = (code_KO * pull_KO).sum(0)
    curve_O = ((H_KK @ code_KO) * code_KO).sum(0)
    fitted_O = (step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)).half().float()
    change_O = fitted_O - step_O
    better_O = (
        (fitted_O * step_O > 0)
        & fitted_O.isfinite()
        & (change_O * (2 * pull_O - change_O * curve_O) > 0)
    )
    step_O += torch.where(better_O, change_O, 0)
    torch.mul(code_KO, step_O, out=weight_KO)


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """Return scales with 1 for those that are zero: their weights are zero too."""
    return torch.where(step == 0, 1, step)


def _start_scales(
    weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step_OB and pinned_OI, the code of each block's weight of largest magnitude and 0 elsewhere.

    Of the scales that are SPANS of what the format would choose, a block takes that of the least squared error, each
    weighted with the energy of its input.
    """
    widest_OB, pinned_OI = _widest(weight_OI, quant)
    step_OB = widest_OB.clone()
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
    """Return step_OB, the scales that the format would choose, and pinned_OI, the codes that make them.

    The pinned code is the one of largest magnitude, also where half precision has too few digits for the scale to give
    the weight that very code: with another one the format would choose another scale next time.
    """
    O, I = weight_OI.shape
    step_OB = torch.from_numpy(quant.steps(quant.quantize(weight_OI.cpu().numpy())).copy()).to(
        weight_OI.device
    )
    weight_OBK = weight_OI.view(O, -1, quant.BLOCK)
    extreme_OB1 = weight_OBK.abs().argmax(2, keepdim=True)
    sign_OB1 = weight_OBK.gather(2, extreme_OB1).sign() * step_OB.sign()[:, :, None]
    pinned_OBK = torch.zeros_like(weight_OBK)
    return step_OB, pinned_OBK.scatter_(2, extreme_OB1, sign_OB1 * max(map(abs, quant.CODES))).view(
        O, I
    )
