"""Formats whose groups have a minimum beside their step: where both begin, and how both are fitted.

A weight is step · code − minimum. Steps are whole numbers of the quant block's scale, the unit, and
minima whole numbers of ``MINIMUM_UNITS`` units. So the second scale that a block has is a multiple
of the first: that costs nothing that could be measured, and the exporter finds the codes again.
Source: ``block_q4_K`` and ``block_q2_K`` in ggml-common.h; ``make_qkx2_quants`` starts like this.
"""

from __future__ import annotations

import torch

from racdeploy.prune.weights.scales import CHUNK_WEIGHTS, divisor, nearest_steps
from racdeploy.quant import MinimumGrid

# Steps to try, as shares of the one that lets the codes reach from a group's lowest weight to its
# highest one.
SPANS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)


def start_lines(
    weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: MinimumGrid
) -> tuple[torch.Tensor, ...]:
    """Return lines of small error, weighed by the inputs.

    Of each group these are its step, its minimum, and the unit that both are whole numbers of.
    """
    O, I = weight_OI.shape
    groups = I // quant.GROUP_SIZE
    found = tuple(weight_OI.new_empty(O, groups) for _ in range(3))

    weight_OGS = weight_OI.view(O, groups, quant.GROUP_SIZE)
    energy_1GS = diagonal_I.view(1, groups, quant.GROUP_SIZE)
    rows = max(CHUNK_WEIGHTS // I, 1)

    for start in range(0, O, rows):
        chunk = slice(start, start + rows)
        step_OG, minimum_OG = _search(weight_OGS[chunk], energy_1GS, quant)
        unit_OG = _share_largest(step_OG, minimum_OG, quant)
        step_OG = nearest_steps(step_OG, unit_OG, quant)

        # The minimum follows the step that the format has.
        code_OGS = _code(weight_OGS[chunk], step_OG, minimum_OG, quant)
        over_OGS = code_OGS * step_OG[:, :, None] - weight_OGS[chunk]
        mean_OG = (over_OGS * energy_1GS).sum(2) / energy_1GS.sum(2)

        minimum_OG = nearest_minima(mean_OG, unit_OG, quant)
        for own_OG, chosen_OG in zip(found, (step_OG, minimum_OG, unit_OG), strict=True):
            own_OG[chunk] = chosen_OG

    return found


def nearest_minima(minimum: torch.Tensor, unit: torch.Tensor, quant: MinimumGrid) -> torch.Tensor:
    """Return the nearest minima that a format has."""
    whole = unit * quant.MINIMUM_UNITS
    number = minimum / divisor(whole)
    return number.round_().clamp_(*quant.MINIMA).mul_(whole)


def fit_lines(
    weight_SO: torch.Tensor,
    pull_SO: torch.Tensor,
    H_SS: torch.Tensor,
    step_O: torch.Tensor,
    minimum_O: torch.Tensor,
    unit_O: torch.Tensor,
    quant: MinimumGrid,
) -> None:
    """Move a group's steps and minima, in place, to better ones that the format has for its codes.

    The error is a paraboloid over both. Its lowest point is rounded: the step first, then the
    minimum that is best beside it. What does not lower the error stays.
    """
    code_SO = ((weight_SO + minimum_O) / divisor(step_O)).round_()
    bent_SO = H_SS @ code_SO
    sum_S = H_SS.sum(1)

    # Along the step s and the minimum m: pulls, and curves of each and of both.
    pull_s_O = (code_SO * pull_SO).sum(0)
    pull_m_O = -pull_SO.sum(0)
    curve_ss_O = (code_SO * bent_SO).sum(0)
    curve_mm = sum_S.sum()
    curve_sm_O = -bent_SO.sum(0)

    bend_O = curve_ss_O * curve_mm - curve_sm_O.square()
    is_bent_O = bend_O > 0
    solved_O = pull_s_O * curve_mm - pull_m_O * curve_sm_O
    solved_O /= torch.where(is_bent_O, bend_O, 1)
    stepped_O = nearest_steps(step_O + torch.where(is_bent_O, solved_O, 0), unit_O, quant)

    for tried_O in (stepped_O, step_O.clone()):
        by_s_O = tried_O - step_O
        rest_O = pull_m_O - by_s_O * curve_sm_O
        by_m_O = nearest_minima(minimum_O + rest_O / curve_mm, unit_O, quant) - minimum_O

        gain_O = 2 * (by_s_O * pull_s_O + by_m_O * pull_m_O)
        gain_O -= by_s_O.square() * curve_ss_O + by_m_O.square() * curve_mm
        gain_O -= 2 * by_s_O * by_m_O * curve_sm_O
        better_O = (gain_O > 0) & (tried_O > 0) & (step_O > 0)

        by_s_O = torch.where(better_O, by_s_O, 0)
        by_m_O = torch.where(better_O, by_m_O, 0)
        step_O += by_s_O
        minimum_O += by_m_O

        # What moved pulls differently now.
        pull_s_O = pull_s_O - by_s_O * curve_ss_O - by_m_O * curve_sm_O
        pull_m_O = pull_m_O - by_s_O * curve_sm_O - by_m_O * curve_mm

    torch.mul(code_SO, step_O, out=weight_SO)
    weight_SO -= minimum_O


def _search(
    weight_OGS: torch.Tensor, energy_1GS: torch.Tensor, quant: MinimumGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best step and minimum of each group, of those that half a dozen spans lead to."""
    lowest_OG = weight_OGS.amin(2).clamp_max(0)
    reach_OG = weight_OGS.amax(2).clamp_min(0) - lowest_OG
    energy_1G = energy_1GS.sum(2)

    best_s_OG = torch.zeros_like(reach_OG)
    best_m_OG = torch.zeros_like(reach_OG)
    least_OG = torch.full_like(reach_OG, torch.inf)

    for span in SPANS:
        tried_OG = reach_OG * (span / quant.CODES[1])
        code_OGS = _code(weight_OGS, tried_OG, -lowest_OG * span, quant)

        # The line through the weights over their codes that is best by weighed squares.
        mean_c_OG = (code_OGS * energy_1GS).sum(2) / energy_1G
        mean_w_OG = (weight_OGS * energy_1GS).sum(2) / energy_1G
        away_OGS = (code_OGS - mean_c_OG[:, :, None]) * energy_1GS
        bend_OG = (away_OGS * code_OGS).sum(2)
        is_bent_OG = bend_OG > 0
        slope_OG = (away_OGS * weight_OGS).sum(2) / torch.where(is_bent_OG, bend_OG, 1)
        is_rising_OG = is_bent_OG & (slope_OG > 0)
        slope_OG = torch.where(is_rising_OG, slope_OG, tried_OG)
        minimum_OG = (mean_c_OG * slope_OG - mean_w_OG).clamp_min_(0)

        lost_OGS = code_OGS * slope_OG[:, :, None]
        lost_OGS -= minimum_OG[:, :, None]
        lost_OGS -= weight_OGS
        error_OG = (lost_OGS.square_() * energy_1GS).sum(2)
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best_s_OG = torch.where(better_OG, slope_OG, best_s_OG)
        best_m_OG = torch.where(better_OG, minimum_OG, best_m_OG)

    return best_s_OG, best_m_OG


def _code(
    weight_OGS: torch.Tensor, step_OG: torch.Tensor, minimum_OG: torch.Tensor, quant: MinimumGrid
) -> torch.Tensor:
    code_OGS = (weight_OGS + minimum_OG[:, :, None]) / divisor(step_OG)[:, :, None]
    return code_OGS.round_().clamp_(*quant.CODES)


def _share_largest(
    step_OG: torch.Tensor, minimum_OG: torch.Tensor, quant: MinimumGrid
) -> torch.Tensor:
    """Return units that bring each block's largest step and minimum into reach, for each group."""
    groups = quant.BLOCK // quant.GROUP_SIZE
    by_step_OG = step_OG / quant.STEP_CODES[1]
    by_minimum_OG = minimum_OG / (quant.MINIMA[1] * quant.MINIMUM_UNITS)

    needed_OXG = torch.maximum(by_step_OG, by_minimum_OG).view(len(step_OG), -1, groups)
    unit_OX1 = needed_OXG.amax(2, keepdim=True).half().float()
    return unit_OX1.expand_as(needed_OXG).reshape(step_OG.shape)
