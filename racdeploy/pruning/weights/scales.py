"""Initial steps (scales) of a format's groups for optimized rounding, and their possible values.

A step is a half-precision number or, where groups share the scale of a quant block, an integer
multiple of it, the unit. The unit is chosen here and fixed. A format whose quantizer derives a
group's scale from its largest weight needs the largest code there: that code is pinned here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from racdeploy.quant import Grid, needs_extreme_code, signed_code_range

# Steps to try, relative to the one that gives the largest weight the largest code: smaller ones
# clip it. The far ones are for formats whose largest weight may have a smaller code.
SPANS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)
_FAR_SPANS = (1.1, 1.15, 1.2, 1.25, 1.3)
CHUNK_WEIGHTS = 1 << 18  # searched at a time: a few arrays of 1 MB fit a core's cache


def search_steps(
    weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Search the step of each group with the least error, weighted by input energy.

    Args:
        diagonal_I: input energies, the diagonal of the Hessian.

    Returns:
        step_OG; unit_OG, for :func:`nearest_steps`; pinned_OI, fixed codes, 0 where a code is free.
    """
    widest_OG, pinned_OI = _pin_largest(weight_OI, quant)
    step_OG = torch.empty_like(widest_OG)
    unit_OG = torch.empty_like(widest_OG)

    shape_OGS = (*widest_OG.shape, quant.GROUP_SIZE)
    weight_OGS = weight_OI.view(shape_OGS)
    pinned_OGS = pinned_OI.view(shape_OGS)
    energy_1GS = diagonal_I.view(1, -1, quant.GROUP_SIZE)
    rows = max(CHUNK_WEIGHTS // weight_OI.shape[1], 1)

    # A few rows at a time: all spans are tried while their arrays are in the cache.
    for start in range(0, len(weight_OI), rows):
        chunk = slice(start, start + rows)
        trial = _Trial(
            weight_OGS=weight_OGS[chunk],
            pinned_OGS=pinned_OGS[chunk],
            energy_1GS=energy_1GS,
            widest_OG=widest_OG[chunk],
            quant=quant,
        )
        step_OG[chunk], unit_OG[chunk] = trial.start()

    return step_OG, unit_OG, pinned_OI


def nearest_steps(step: torch.Tensor, unit: torch.Tensor, quant: Grid) -> torch.Tensor:
    """Return the nearest steps that a format can represent; ``unit`` is ignored without units."""
    if quant.STEP_CODE_RANGE == (1, 1):
        return step.half().float()

    number = step / ones_for_zeros(unit)
    return number.round_().clamp_(*quant.STEP_CODE_RANGE).mul_(unit)


def ones_for_zeros(step: torch.Tensor) -> torch.Tensor:
    """Return steps to divide by: 1 in place of 0, whose weights are zero too."""
    return torch.where(step == 0, 1, step)


@dataclass(frozen=True)
class _Trial:
    """Rows whose steps are searched; with widest_OG the largest weights get the largest code."""

    weight_OGS: torch.Tensor
    pinned_OGS: torch.Tensor
    energy_1GS: torch.Tensor
    widest_OG: torch.Tensor
    quant: Grid

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return step_OG and unit_OG."""
        if self.quant.STEP_CODE_RANGE == (1, 1):
            none_OG = torch.zeros_like(self.widest_OG)
            return self._search(none_OG, self.widest_OG)[0], none_OG

        # The largest of the best free steps gives the unit, in which all steps are searched again.
        free_OG, _ = self._search(None, self.widest_OG)
        unit_OG = self._share_largest(free_OG)
        if self.quant.STEP_CODE_RANGE[0] < 0:
            return self._search(unit_OG, self.widest_OG)[0], unit_OG

        # Without signed step codes the unit has the sign: take the better one for all groups.
        size_OG = self.widest_OG.abs()
        unit_OG = unit_OG.abs()
        up_OG, lost_up_OG = self._search(unit_OG, size_OG)
        down_OG, lost_down_OG = self._search(-unit_OG, -size_OG)
        is_up_OG = self._sum_blocks(lost_up_OG) <= self._sum_blocks(lost_down_OG)
        step_OG = torch.where(is_up_OG, up_OG, down_OG)
        unit_OG = torch.where(is_up_OG, unit_OG, -unit_OG)
        return step_OG, unit_OG

    def _sum_blocks(self, lost_OG: torch.Tensor) -> torch.Tensor:
        """Return the sum over each block, repeated for each of its groups."""
        groups = self.quant.BLOCK_SIZE // self.quant.GROUP_SIZE
        lost_OXG = lost_OG.view(len(lost_OG), -1, groups)
        return lost_OXG.sum(2, keepdim=True).expand_as(lost_OXG).reshape(lost_OG.shape)

    def _share_largest(self, step_OG: torch.Tensor) -> torch.Tensor:
        """Return units that give each block's largest step the largest step code."""
        groups = self.quant.BLOCK_SIZE // self.quant.GROUP_SIZE
        step_OXG = step_OG.view(len(step_OG), -1, groups)  # X: blocks of a row

        index_OX1 = step_OXG.abs().argmax(2, keepdim=True)
        largest_OX1 = step_OXG.gather(2, index_OX1)

        scale_OX1 = largest_OX1 / max(self.quant.STEP_CODE_RANGE, key=abs)
        scale_OXG = scale_OX1.half().float().expand_as(step_OXG)
        return scale_OXG.reshape(step_OG.shape)

    def _search(
        self, unit_OG: torch.Tensor | None, widest_OG: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best step of each group and its error.

        Args:
            unit_OG: steps are multiples of it; None: any number.
            widest_OG: the steps that give the largest weight the largest code.
        """
        spans = SPANS if needs_extreme_code(self.quant) else SPANS + _FAR_SPANS
        best_OG = widest_OG.clone()
        lowest_error_OG = torch.full_like(best_OG, torch.inf)

        for span in spans:
            tried_OG = widest_OG * span

            if unit_OG is not None:
                tried_OG = nearest_steps(tried_OG, unit_OG, self.quant)

            code_OGS = self.weight_OGS / ones_for_zeros(tried_OG)[:, :, None]
            code_OGS.round_().clamp_(*signed_code_range(self.quant))

            # Pinned weights have the same code with any step.
            code_OGS = torch.where(self.pinned_OGS == 0, code_OGS, self.pinned_OGS)

            lost_OGS = code_OGS.mul_(tried_OG[:, :, None])
            lost_OGS -= self.weight_OGS
            error_OG = lost_OGS.square_().mul_(self.energy_1GS).sum(2)

            better_OG = error_OG < lowest_error_OG
            lowest_error_OG = torch.where(better_OG, error_OG, lowest_error_OG)
            best_OG = torch.where(better_OG, tried_OG, best_OG)

        return best_OG, lowest_error_OG


def _pin_largest(weight_OI: torch.Tensor, quant: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the widest steps and the pinned codes.

    Returns:
        widest_OG, the step that gives each group's largest weight the largest code; pinned_OI,
        these codes if the format pins them, else 0. A pinned code is the largest one even where
        rounding of the scale to half precision would give another: with that one, the format's
        own quantizer would choose another scale.
    """
    O, I = weight_OI.shape
    weight_OGS = weight_OI.view(O, I // quant.GROUP_SIZE, quant.GROUP_SIZE)
    index_OG1 = weight_OGS.abs().argmax(2, keepdim=True)
    largest_OG1 = weight_OGS.gather(2, index_OG1)

    codes = signed_code_range(quant)
    largest_code = max(codes, key=abs)
    widest_OG1 = largest_OG1 / largest_code

    # A symmetric range of codes needs no sign in the step.
    if codes[0] == -codes[1]:
        widest_OG1.abs_()

    pinned_OGS = torch.zeros_like(weight_OGS)
    if needs_extreme_code(quant):
        widest_OG1 = widest_OG1.half().float()
        code_OG1 = largest_OG1.sign() * widest_OG1.sign() * abs(largest_code)
        pinned_OGS.scatter_(2, index_OG1, code_OG1)

    return widest_OG1[:, :, 0], pinned_OGS.view_as(weight_OI)
