"""Choose the codes of a number format while pruning compensates; the exporter writes them.

Slab by slab, columns are rounded and those to come solved again. Then, again and again, each weight
moves to the grid point that is best while all others stay, each quant block's scale to the best for
its codes. A block's largest weight keeps the largest code: quantizing again gives the same.
Source: QuantEase (arXiv 2309.01885) on a mask, in GPTQ's order (arXiv 2210.17323); scales move.
"""

from __future__ import annotations

import math

import torch

from racdeploy.prune.hessian import Hessian
from racdeploy.prune.methods import Pruned
from racdeploy.prune.refit import descend
from racdeploy.quant import Grid

SLABS, DESCENT_STEPS = 8, 4  # more lower the error of a linear by less than 1 %
SCALE_SWEEPS, CODE_SWEEPS = 4, 4
CHUNK_COLUMNS = 128  # visited on a transposed copy; the rest of the row is brought up once a chunk
# Scales to try, as shares of the format's own: smaller ones clip, a larger one moves every code.
SPANS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
_CHUNK_WEIGHTS = 1 << 18  # of a scale search at a time: a few arrays of 1 MB stay in a core's cache


def round_to_grid(
    pruned: Pruned, target_OI: torch.Tensor, hessian: Hessian, quant: Grid
) -> torch.Tensor:
    """Return weights that ``quant`` stores exactly, zero off the mask; ``target_OI``: unpruned."""
    code_OI, step_OG = find_codes(pruned, target_OI, hessian, quant)
    step_OI = step_OG.repeat_interleave(quant.BLOCK, dim=1)
    return code_OI.mul_(step_OI)


def find_codes(
    pruned: Pruned, target_OI: torch.Tensor, hessian: Hessian, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return code_OI, whole numbers in float32, and step_OG, scales that half precision has."""
    search = _Search(pruned, target_OI, hessian.matrix_II, quant)
    I = target_OI.shape[1]
    width = math.ceil(I / (SLABS * quant.BLOCK)) * quant.BLOCK

    for start in range(0, I, width):
        if start:
            search.solve_from(start)

        search.visit(start, min(start + width, I), scales=True)

    search.recompute_pull()

    for _ in range(SCALE_SWEEPS):
        search.visit(0, I, scales=True)

    for _ in range(CODE_SWEEPS):
        moved = search.visit(0, I, scales=False)
        if not moved:
            break

    step_OI = _divisor(search.step_OG).repeat_interleave(quant.BLOCK, dim=1)
    code_OI = (search.weight_OI / step_OI).round_()
    return code_OI, search.step_OG


class _Search:
    """Weights on their way to the grid, and the pull on each: minus half the slope of the error."""

    def __init__(
        self, pruned: Pruned, target_OI: torch.Tensor, H_II: torch.Tensor, quant: Grid
    ) -> None:
        self.H_II, self.target_OI = H_II, target_OI
        self.S, self.codes = quant.BLOCK, quant.CODES
        weight_OI = pruned.weight_OI * pruned.keep_OI
        self.step_OG, pinned_OI = _start_scales(weight_OI, H_II.diagonal(), quant)

        has_scale_OI = (self.step_OG != 0).repeat_interleave(self.S, dim=1)
        self.free_OI = pruned.keep_OI & has_scale_OI & (pinned_OI == 0)
        pinned_OI *= self.step_OG.repeat_interleave(self.S, dim=1)
        self.weight_OI = weight_OI.mul_(self.free_OI).add_(pinned_OI)
        self.pull_OI = (target_OI - self.weight_OI) @ H_II

    def solve_from(self, start: int) -> None:
        """Move the free weights from ``start`` on, off the grid; the pull before it gets wrong."""
        weight_OC, pull_OC = self.weight_OI[:, start:], self.pull_OI[:, start:]
        H_CC = self.H_II[start:, start:]
        descend(weight_OC, pull_OC, self.free_OI[:, start:], H_CC, DESCENT_STEPS)

    def recompute_pull(self) -> None:
        off_OI = self.target_OI - self.weight_OI
        torch.matmul(off_OI, self.H_II, out=self.pull_OI)

    def visit(self, start: int, stop: int, scales: bool) -> bool:
        """Move each weight (with ``scales``, scales too) to its best value; return if any moved."""
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

            steps_OX = self.step_OG[:, first // self.S : last // self.S]  # X: blocks of the chunk

            for index, step_O in enumerate(steps_OX.unbind(1)):
                begin = index * self.S
                block = slice(begin, begin + self.S)
                H_SS = H_CC[block, block]
                weight_SO, pull_SO = weight_CO[block], pull_CO[block].clone()
                self._move(weight_SO, pull_SO, free_CO[block], H_SS, _divisor(step_O))
                if scales:
                    _fit_scales(weight_SO, pull_SO, H_SS, step_O)

                # The other columns of the chunk feel this block's moves at once …
                change_SO = weight_SO - before_CO[block]
                pull_CO.addmm_(H_CC[:, block], change_SO, alpha=-1)

            # … and the rest of the row feels the chunk's.
            change_CO = weight_CO - before_CO
            self.pull_OI.addmm_(change_CO.T, self.H_II[chunk], alpha=-1)
            self.weight_OI[:, chunk] = weight_CO.T
            moved |= bool(change_CO.any())

        return moved

    def _move(
        self,
        weight_SO: torch.Tensor,
        pull_SO: torch.Tensor,
        free_SO: torch.Tensor,
        H_SS: torch.Tensor,
        step_O: torch.Tensor,
    ) -> None:
        """Move a block's weights in place, one column after the other, and the pull on them."""
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


def _transpose(values_OC: torch.Tensor) -> torch.Tensor:
    return values_OC.T.clone(memory_format=torch.contiguous_format)


def _fit_scales(
    weight_SO: torch.Tensor, pull_SO: torch.Tensor, H_SS: torch.Tensor, step_O: torch.Tensor
) -> None:
    """Move a block's scales, in place, to the best ones that half precision has for its codes."""
    code_SO = (weight_SO / _divisor(step_O)).round_()
    pull_O = (code_SO * pull_SO).sum(0)
    curve_O = ((H_SS @ code_SO) * code_SO).sum(0)

    # The error along the scale is a parabola: its lowest point, rounded, and whether that is lower.
    best_O = step_O + pull_O / torch.where(curve_O > 0, curve_O, 1)
    fitted_O = best_O.half().float()
    change_O = fitted_O - step_O
    falls_O = change_O * (2 * pull_O - change_O * curve_O) > 0
    same_sign_O = fitted_O * step_O > 0
    better_O = same_sign_O & fitted_O.isfinite() & falls_O

    step_O += torch.where(better_O, change_O, 0)
    torch.mul(code_SO, step_O, out=weight_SO)


def _divisor(step: torch.Tensor) -> torch.Tensor:
    """Return scales with 1 for those that are zero: their weights are zero too."""
    return torch.where(step == 0, 1, step)


def _start_scales(
    weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step_OG, of least weighted error, and pinned_OI: codes of blocks' largest, else 0."""
    own_OG, pinned_OI = _choose_pinned(weight_OI, quant)
    energy_1GS = diagonal_I.view(1, -1, quant.BLOCK)
    step_OG = own_OG.clone()
    rows = max(_CHUNK_WEIGHTS // weight_OI.shape[1], 1)

    for start in range(0, len(weight_OI), rows):
        chunk = slice(start, start + rows)
        format_OG = own_OG[chunk]
        weight_OGS = weight_OI[chunk].view(*format_OG.shape, quant.BLOCK)
        pinned_OGS = pinned_OI[chunk].view_as(weight_OGS)

        least_OG = torch.full_like(format_OG, torch.inf)

        for span in SPANS:
            tried_OG = (format_OG * span).half().float()
            code_OGS = weight_OGS / _divisor(tried_OG)[:, :, None]
            code_OGS.round_().clamp_(*quant.CODES)
            code_OGS = torch.where(pinned_OGS == 0, code_OGS, pinned_OGS)

            lost_OGS = code_OGS.mul_(tried_OG[:, :, None])
            lost_OGS -= weight_OGS
            error_OG = lost_OGS.square_().mul_(energy_1GS).sum(2)

            better_OG = error_OG < least_OG
            least_OG = torch.where(better_OG, error_OG, least_OG)
            step_OG[chunk] = torch.where(better_OG, tried_OG, step_OG[chunk])

    return step_OG, pinned_OI


def _choose_pinned(weight_OI: torch.Tensor, quant: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return step_OG, the scales that the format would choose, and pinned_OI, their codes.

    A pinned code is the largest, also where half precision has too few digits for the scale to give
    it: with another one the format would choose another scale next time.
    """
    stored = quant.quantize(weight_OI.cpu().numpy())
    steps = quant.steps(stored).copy()
    step_OG = torch.from_numpy(steps).to(weight_OI.device)

    weight_OGS = weight_OI.view(*step_OG.shape, quant.BLOCK)
    place_OG1 = weight_OGS.abs().argmax(2, keepdim=True)
    code_OG1 = weight_OGS.gather(2, place_OG1).sign()
    code_OG1 *= step_OG.sign()[:, :, None]
    code_OG1 *= max(map(abs, quant.CODES))

    pinned_OGS = torch.zeros_like(weight_OGS)
    pinned_OGS.scatter_(2, place_OG1, code_OG1)
    return step_OG, pinned_OGS.view_as(weight_OI)
