"""Steps and minima of asymmetric formats: a search for initial values, and their fit to codes.

A weight is step · code − minimum. Steps are integer multiples of the quant block's scale, the unit,
and minima integer multiples of ``MINIMUM_SCALE_RATIO`` units. So a block's second scale is a fixed
multiple of its first one: that has no measurable cost, and lets the exporter recover the codes.
Source: ``block_q4_K`` and ``block_q2_K`` in ggml-common.h; the search is that of
``make_qkx2_quants``.
"""

from __future__ import annotations

import torch

from racdeploy.pruning.weights.scales import CHUNK_WEIGHTS, nearest_steps, ones_for_zeros
from racdeploy.quant import AsymmetricGrid

# Steps to try, relative to the one whose codes span a group's weights exactly.
SPANS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)


def search_steps_and_minima(
    weight_OI: torch.Tensor, diagonal_I: torch.Tensor, quant: AsymmetricGrid
) -> tuple[torch.Tensor, ...]:
    """Search the step and minimum of each group with the least error, weighted by input energy.

    Args:
        diagonal_I: input energies, the diagonal of the Hessian.

    Returns:
        step_OG; minimum_OG; unit_OG, of which both are integer multiples.
    """
    O, I = weight_OI.shape
    groups = I // quant.GROUP_SIZE
    lines = tuple(weight_OI.new_empty(O, groups) for _ in range(3))

    weight_OGS = weight_OI.view(O, groups, quant.GROUP_SIZE)
    energy_1GS = diagonal_I.view(1, groups, quant.GROUP_SIZE)
    rows = max(CHUNK_WEIGHTS // I, 1)

    for start in range(0, O, rows):
        chunk = slice(start, start + rows)
        step_OG, minimum_OG = _search(weight_OGS[chunk], energy_1GS, quant)
        unit_OG = _share_largest(step_OG, minimum_OG, quant)
        step_OG = nearest_steps(step_OG, unit_OG, quant)

        # The best minimum for the rounded step.
        code_OGS = _code(weight_OGS[chunk], step_OG, minimum_OG, quant)
        over_OGS = code_OGS * step_OG[:, :, None] - weight_OGS[chunk]
        mean_OG = (over_OGS * energy_1GS).sum(2) / energy_1GS.sum(2)

        minimum_OG = nearest_minima(mean_OG, unit_OG, quant)
        for line_OG, chosen_OG in zip(lines, (step_OG, minimum_OG, unit_OG), strict=True):
            line_OG[chunk] = chosen_OG

    return lines


def nearest_minima(
    minimum: torch.Tensor, unit: torch.Tensor, quant: AsymmetricGrid
) -> torch.Tensor:
    """Return the nearest minima that a format can represent."""
    whole = unit * quant.MINIMUM_SCALE_RATIO
    number = minimum / ones_for_zeros(whole)
    return number.round_().clamp_(*quant.MINIMUM_CODE_RANGE).mul_(whole)


def fit_steps_and_minima(
    weight_SO: torch.Tensor,
    pull_SO: torch.Tensor,
    H_SS: torch.Tensor,
    step_O: torch.Tensor,
    minimum_O: torch.Tensor,
    unit_O: torch.Tensor,
    quant: AsymmetricGrid,
) -> None:
    """Improve a group's steps and minima in place for its codes, and update the weights.

    The error is quadratic in both. Its minimum is rounded to the format: the step first, then the
    best minimum for that step. A change that does not lower the error is not made.
    """
    code_SO = ((weight_SO + minimum_O) / ones_for_zeros(step_O)).round_()
    bent_SO = H_SS @ code_SO
    sum_S = H_SS.sum(1)

    # Negative half gradient (pull) and second derivatives along the step s and the minimum m.
    pull_s_O = (code_SO * pull_SO).sum(0)
    pull_m_O = -pull_SO.sum(0)
    curve_ss_O = (code_SO * bent_SO).sum(0)
    curve_mm = sum_S.sum()
    curve_sm_O = -bent_SO.sum(0)

    determinant_O = curve_ss_O * curve_mm - curve_sm_O.square()
    is_convex_O = determinant_O > 0
    solved_O = pull_s_O * curve_mm - pull_m_O * curve_sm_O
    solved_O /= torch.where(is_convex_O, determinant_O, 1)
    stepped_O = nearest_steps(step_O + torch.where(is_convex_O, solved_O, 0), unit_O, quant)

    for tried_O in (stepped_O, step_O.clone()):
        step_change_O = tried_O - step_O
        rest_O = pull_m_O - step_change_O * curve_sm_O
        minimum_change_O = nearest_minima(minimum_O + rest_O / curve_mm, unit_O, quant) - minimum_O

        gain_O = 2 * (step_change_O * pull_s_O + minimum_change_O * pull_m_O)
        gain_O -= step_change_O.square() * curve_ss_O + minimum_change_O.square() * curve_mm
        gain_O -= 2 * step_change_O * minimum_change_O * curve_sm_O
        better_O = (gain_O > 0) & (tried_O > 0) & (step_O > 0)

        step_change_O = torch.where(better_O, step_change_O, 0)
        minimum_change_O = torch.where(better_O, minimum_change_O, 0)
        step_O += step_change_O
        minimum_O += minimum_change_O

        # The gradient at the new values.
        pull_s_O = pull_s_O - step_change_O * curve_ss_O - minimum_change_O * curve_sm_O
        pull_m_O = pull_m_O - step_change_O * curve_sm_O - minimum_change_O * curve_mm

    torch.mul(code_SO, step_O, out=weight_SO)
    weight_SO -= minimum_O


def _search(
    weight_OGS: torch.Tensor, energy_1GS: torch.Tensor, quant: AsymmetricGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best step and minimum of each group, over the spans that are tried."""
    lowest_OG = weight_OGS.amin(2).clamp_max(0)
    reach_OG = weight_OGS.amax(2).clamp_min(0) - lowest_OG
    energy_1G = energy_1GS.sum(2)

    best_s_OG = torch.zeros_like(reach_OG)
    best_m_OG = torch.zeros_like(reach_OG)
    lowest_error_OG = torch.full_like(reach_OG, torch.inf)

    for span in SPANS:
        tried_OG = reach_OG * (span / quant.CODE_RANGE[1])
        code_OGS = _code(weight_OGS, tried_OG, -lowest_OG * span, quant)

        # Weighted least squares: the line through the weights over their codes.
        mean_c_OG = (code_OGS * energy_1GS).sum(2) / energy_1G
        mean_w_OG = (weight_OGS * energy_1GS).sum(2) / energy_1G
        away_OGS = (code_OGS - mean_c_OG[:, :, None]) * energy_1GS
        variance_OG = (away_OGS * code_OGS).sum(2)
        has_slope_OG = variance_OG > 0
        slope_OG = (away_OGS * weight_OGS).sum(2) / torch.where(has_slope_OG, variance_OG, 1)
        is_rising_OG = has_slope_OG & (slope_OG > 0)
        slope_OG = torch.where(is_rising_OG, slope_OG, tried_OG)
        minimum_OG = (mean_c_OG * slope_OG - mean_w_OG).clamp_min_(0)

        lost_OGS = code_OGS * slope_OG[:, :, None]
        lost_OGS -= minimum_OG[:, :, None]
        lost_OGS -= weight_OGS
        error_OG = (lost_OGS.square_() * energy_1GS).sum(2)
        better_OG = error_OG < lowest_error_OG
        lowest_error_OG = torch.where(better_OG, error_OG, lowest_error_OG)
        best_s_OG = torch.where(better_OG, slope_OG, best_s_OG)
        best_m_OG = torch.where(better_OG, minimum_OG, best_m_OG)

    return best_s_OG, best_m_OG


def _code(
    weight_OGS: torch.Tensor, step_OG: torch.Tensor, minimum_OG: torch.Tensor, quant: AsymmetricGrid
) -> torch.Tensor:
    code_OGS = (weight_OGS + minimum_OG[:, :, None]) / ones_for_zeros(step_OG)[:, :, None]
    return code_OGS.round_().clamp_(*quant.CODE_RANGE)


def _share_largest(
    step_OG: torch.Tensor, minimum_OG: torch.Tensor, quant: AsymmetricGrid
) -> torch.Tensor:
    """Return each block's smallest unit that can represent all its steps and minima, per group."""
    groups = quant.BLOCK_SIZE // quant.GROUP_SIZE
    step_scale_OG = step_OG / quant.STEP_CODE_RANGE[1]
    minimum_scale_OG = minimum_OG / (quant.MINIMUM_CODE_RANGE[1] * quant.MINIMUM_SCALE_RATIO)

    needed_OXG = torch.maximum(step_scale_OG, minimum_scale_OG).view(len(step_OG), -1, groups)
    unit_OX1 = needed_OXG.amax(2, keepdim=True).half().float()
    return unit_OX1.expand_as(needed_OXG).reshape(step_OG.shape)
