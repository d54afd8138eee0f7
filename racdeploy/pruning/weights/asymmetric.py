"""Steps and minima of asymmetric formats: a search for initial values, and their fit to codes.

A weight is step · code − minimum. Steps and minima are integer multiples of the quant block's two
scales, their units.
Source: ``block_q4_K`` and ``block_q2_K`` in ggml-common.h; the search is that of
``make_qkx2_quants``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from racdeploy.pruning.weights.scales import (
    ColumnGroup,
    find_units,
    nearest_steps,
    ones_for_zeros,
    search_by_rows,
)
from racdeploy.quant.grid import Grid

# Steps to try, relative to the one whose codes span a group's weights exactly.
SPANS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)


@dataclass(frozen=True)
class StepsAndMinima:
    """Step and minimum of each group, and the units of both."""

    step_OG: Tensor
    minimum_OG: Tensor
    step_unit_OG: Tensor
    minimum_unit_OG: Tensor


def search_steps_and_minima(weight_OI: Tensor, diagonal_I: Tensor, grid: Grid) -> StepsAndMinima:
    """Search the step and minimum of each group with the least error, weighted by input energy.

    Args:
        diagonal_I: input energies, the diagonal of the Hessian.
    """
    assert grid.step_codes
    assert grid.minimum_codes
    step_codes, minimum_codes = grid.step_codes, grid.minimum_codes

    def search(weight_OGS: Tensor, energy_1GS: Tensor) -> tuple[Tensor, ...]:
        step_OG, minimum_OG = search_free(weight_OGS, energy_1GS, grid)
        unit_OG = find_units(step_OG, step_codes, grid)
        step_OG = nearest_steps(step_OG, unit_OG, grid)
        minimum_unit_OG = find_units(minimum_OG, minimum_codes, grid)

        # The best minimum for the rounded step.
        code_OGS = _code(weight_OGS, step_OG, minimum_OG, grid)
        over_OGS = code_OGS * step_OG[:, :, None] - weight_OGS
        mean_OG = (over_OGS * energy_1GS).sum(2) / energy_1GS.sum(2)
        minimum_OG = nearest_minima(mean_OG, minimum_unit_OG, grid)
        return step_OG, minimum_OG, unit_OG, minimum_unit_OG

    step_OG, minimum_OG, step_unit_OG, minimum_unit_OG = search_by_rows(
        search, weight_OI, diagonal_I, grid
    )
    return StepsAndMinima(step_OG, minimum_OG, step_unit_OG, minimum_unit_OG)


def nearest_minima(minimum: Tensor, unit: Tensor, grid: Grid) -> Tensor:
    """Return the nearest minima that a format can represent."""
    assert grid.minimum_codes
    number = minimum / ones_for_zeros(unit)
    return number.round_().clamp_(*grid.minimum_codes).mul_(unit)


def fit_steps_and_minima(group: ColumnGroup, steps: StepsAndMinima, grid: Grid) -> None:
    """Improve a group's steps and minima in place for its codes, and update the weights.

    The error is quadratic in both. Its minimum is rounded to the format: the step first, then the
    best minimum for that step. A change that does not lower the error is not made.
    """
    step_O = steps.step_OG[:, group.index]
    minimum_O = steps.minimum_OG[:, group.index]
    step_unit_O = steps.step_unit_OG[:, group.index]
    minimum_unit_O = steps.minimum_unit_OG[:, group.index]

    code_SO = ((group.weight_SO + minimum_O) / ones_for_zeros(step_O)).round_()
    bent_SO = group.H_SS @ code_SO
    sum_S = group.H_SS.sum(1)

    error = _Error(
        pull_s_O=(code_SO * group.pull_SO).sum(0),
        pull_m_O=-group.pull_SO.sum(0),
        curve_ss_O=(code_SO * bent_SO).sum(0),
        curve_mm=sum_S.sum(),
        curve_sm_O=-bent_SO.sum(0),
    )
    stepped_O = nearest_steps(step_O + error.solve_s(), step_unit_O, grid)

    for tried_O in (stepped_O, step_O.clone()):
        by_s_O = tried_O - step_O
        best_m_O = minimum_O + error.solve_m(by_s_O)
        by_m_O = nearest_minima(best_m_O, minimum_unit_O, grid) - minimum_O
        better_O = (error.gain(by_s_O, by_m_O) > 0) & (tried_O > 0) & (step_O > 0)

        by_s_O = torch.where(better_O, by_s_O, 0)
        by_m_O = torch.where(better_O, by_m_O, 0)
        step_O += by_s_O
        minimum_O += by_m_O
        error.move(by_s_O, by_m_O)

    weight_SO = group.weight_SO
    torch.mul(code_SO, step_O, out=weight_SO)
    weight_SO -= minimum_O


@dataclass
class _Error:
    """The error of a group for its codes, quadratic in its step s and its minimum m.

    ``pull``: negative half gradient. ``curve``: second derivatives.
    """

    pull_s_O: Tensor
    pull_m_O: Tensor
    curve_ss_O: Tensor
    curve_mm: Tensor
    curve_sm_O: Tensor

    def solve_s(self) -> Tensor:
        """Return the change of the step to the least error over both, 0 where there is none."""
        determinant_O = self.curve_ss_O * self.curve_mm - self.curve_sm_O.square()
        is_convex_O = determinant_O > 0
        solved_O = self.pull_s_O * self.curve_mm - self.pull_m_O * self.curve_sm_O
        solved_O /= torch.where(is_convex_O, determinant_O, 1)
        return torch.where(is_convex_O, solved_O, 0)

    def solve_m(self, by_s_O: Tensor) -> Tensor:
        """Return the best change of the minimum after a change of the step."""
        rest_O = self.pull_m_O - by_s_O * self.curve_sm_O
        return rest_O / self.curve_mm

    def gain(self, by_s_O: Tensor, by_m_O: Tensor) -> Tensor:
        """Return how much changes lower the error."""
        gain_O = 2 * (by_s_O * self.pull_s_O + by_m_O * self.pull_m_O)
        gain_O -= by_s_O.square() * self.curve_ss_O + by_m_O.square() * self.curve_mm
        gain_O -= 2 * by_s_O * by_m_O * self.curve_sm_O
        return gain_O

    def move(self, by_s_O: Tensor, by_m_O: Tensor) -> None:
        """Take the gradient at changed values."""
        self.pull_s_O = self.pull_s_O - by_s_O * self.curve_ss_O - by_m_O * self.curve_sm_O
        self.pull_m_O = self.pull_m_O - by_s_O * self.curve_sm_O - by_m_O * self.curve_mm


def search_free(weight_OGS: Tensor, energy_1GS: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the best step and minimum of each group, any numbers, over the spans tried."""
    lowest_OG = weight_OGS.amin(2).clamp_max(0)
    reach_OG = weight_OGS.amax(2).clamp_min(0) - lowest_OG
    energy_1G = energy_1GS.sum(2)

    best_s_OG = torch.zeros_like(reach_OG)
    best_m_OG = torch.zeros_like(reach_OG)
    lowest_error_OG = torch.full_like(reach_OG, torch.inf)

    for span in SPANS:
        tried_OG = reach_OG * (span / grid.values[-1])
        code_OGS = _code(weight_OGS, tried_OG, -lowest_OG * span, grid)

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


def _code(weight_OGS: Tensor, step_OG: Tensor, minimum_OG: Tensor, grid: Grid) -> Tensor:
    code_OGS = (weight_OGS + minimum_OG[:, :, None]) / ones_for_zeros(step_OG)[:, :, None]
    return code_OGS.round_().clamp_(grid.values[0], grid.values[-1])
