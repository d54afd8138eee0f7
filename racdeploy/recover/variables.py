"""What the optimizer moves: weights, or what lies behind weights on the grid of a number format.

``Scales`` keeps the codes that were chosen and moves the scales: in every forward pass weights are
whole codes times the step of their group, and scales have values of half precision, which get the
gradients as if there were no rounding (straight-through, Bengio et al., arXiv 1308.3432).

Where processes have rows of the weights, each has the same rows of what lies behind them: quant
blocks lie along inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from racdeploy.prune.processes import ALONE, Processes
from racdeploy.quant import Grid

_FACTORS = (0.5, 2.0)
"""Of a scale: it keeps its sign, and half precision does not run out."""


class Weights:
    """Weights that the optimizer moves themselves."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = self.moved = dict(weights)

    def gather(self) -> None:
        """Hand the gradients of the weights on to what is moved."""

    def settle(self) -> None:
        """Set the weights to what the moved values mean."""


class Scales(Weights):
    """Linears on a grid, their scales free to change; other weights are moved themselves.

    What is moved is a factor of each scale: scales differ by orders of magnitude, and a learning
    rate fits only what is about 1. Steps of groups that share a scale move with it.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        linears: Mapping[str, Tensor],
        grid: Grid,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__({**weights, **linears})
        self._group_size = grid.GROUP_SIZE
        self._groups = grid.BLOCK // grid.GROUP_SIZE
        # Of each linear: its codes, the steps' numbers, and the scales as they were.
        self._grids: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.moved = dict(weights)

        for name, weight_OI in linears.items():
            step_OG = read_steps(weight_OI, grid)
            code_OI = codes_of(weight_OI, step_OG, self._group_size)
            exact = torch.equal(code_OI * _spread(step_OG, self._group_size), weight_OI.detach())
            if not all(processes.all(exact)):
                weight_OI.requires_grad_(False)
                continue

            # X: quant blocks of a row.
            scale_OX = _read(weight_OI, grid, grid.scales, grid.BLOCK)
            step_code_OG = codes_of(step_OG, scale_OX, self._groups)
            self._grids[name] = code_OI.to(torch.int8), step_code_OG, scale_OX
            self.moved[name] = torch.ones_like(scale_OX)

    def gather(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            weight_OI = self.weights[name]
            if weight_OI.grad is None:
                continue

            slope_OI = weight_OI.grad * code_OI
            slope_OG = slope_OI.view(*step_code_OG.shape, self._group_size).sum(2)
            slope_OG *= step_code_OG

            slope_OX = slope_OG.view(*scale_OX.shape, self._groups).sum(2)
            self.moved[name].grad = slope_OX * scale_OX
            weight_OI.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            factor_OX = self.moved[name].clamp_(*_FACTORS)
            stored_OX = (scale_OX * factor_OX).half().float()

            step_OG = step_code_OG * _spread(stored_OX, self._groups)
            weight_OI = self.weights[name]
            weight_OI.copy_(code_OI.float() * _spread(step_OG, self._group_size))


def read_steps(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Return step_OG, the step of every group of weights that lie on a grid."""
    return _read(weight_OI, grid, grid.steps, grid.GROUP_SIZE)


def _read(
    weight_OI: Tensor,
    grid: Grid,
    of_packed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    size: int,
) -> Tensor:
    O, I = weight_OI.shape
    if not O:  # of several processes, this one has no rows
        return weight_OI.new_zeros(O, I // size)

    values_OI = weight_OI.detach().cpu().numpy().astype(np.float32)
    found = of_packed(grid.quantize(values_OI)).copy()
    return torch.from_numpy(found).to(weight_OI.device)


def codes_of(weight_OI: Tensor, step_OG: Tensor, group_size: int) -> Tensor:
    """Return code_OI, whole numbers in float32; 0 where the step is."""
    divisor_OG = torch.where(step_OG == 0, 1, step_OG)
    quotient_OI = weight_OI.detach() / _spread(divisor_OG, group_size)
    return quotient_OI.round_()


def _spread(value_OG: Tensor, group_size: int) -> Tensor:
    """Give every weight what its group has."""
    return value_OG.repeat_interleave(group_size, dim=1)
