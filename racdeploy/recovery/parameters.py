"""Trainable parameters: weights, or the scales of weights on the grid of a number format.

``ScaleParameters`` freezes the codes and trains the scales. In every forward pass weights are
integer codes times the step of their group, with scales rounded to half precision; gradients ignore
the rounding (straight-through estimator, Bengio et al., arXiv 1308.3432).

A process that has some rows of the weights has the same rows of the scales: quant blocks lie along
inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from racdeploy.pruning.process_group import SINGLE_PROCESS, ProcessGroup
from racdeploy.quant import Grid

_FACTOR_RANGE = (0.5, 2.0)
"""Bounds of a scale's trained factor: its sign stays, and half precision does not overflow."""


class WeightParameters:
    """Weights that are trained directly."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = self.parameters = dict(weights)

    def propagate_gradients(self) -> None:
        """Set the gradients of the trained parameters from those of the weights."""

    def update_weights(self) -> None:
        """Recompute the weights from the trained parameters."""


class ScaleParameters(WeightParameters):
    """Trained scales of linears on a grid; other weights are trained directly.

    The parameter is a factor of each scale, about 1: scales differ by orders of magnitude, so no
    learning rate would fit them all. All groups of a quant block change with its scale. Linears
    that are not exactly on the grid are frozen.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        linears: Mapping[str, Tensor],
        grid: Grid,
        processes: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__({**weights, **linears})
        self._group_size = grid.GROUP_SIZE
        self._groups = grid.BLOCK_SIZE // grid.GROUP_SIZE
        # Per linear: its codes, its groups' step codes, and its initial scales.
        self._grids: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.parameters = dict(weights)

        for name, weight_OI in linears.items():
            step_OG = read_steps(weight_OI, grid)
            code_OI = compute_codes(weight_OI, step_OG, self._group_size)
            exact = torch.equal(code_OI * _spread(step_OG, self._group_size), weight_OI.detach())
            # All processes must agree, or the shards of a linear would be trained differently.
            if not all(processes.all_gather(exact)):
                weight_OI.requires_grad_(False)
                continue

            # X: quant blocks of a row.
            scale_OX = _read(weight_OI, grid, grid.scales, grid.BLOCK_SIZE)
            step_code_OG = compute_codes(step_OG, scale_OX, self._groups)
            self._grids[name] = code_OI.to(torch.int8), step_code_OG, scale_OX
            self.parameters[name] = torch.ones_like(scale_OX)

    def propagate_gradients(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            weight_OI = self.weights[name]
            if weight_OI.grad is None:
                continue

            # Chain rule of weight = code · step code · (scale · factor), summed over each block.
            gradient_OI = weight_OI.grad * code_OI
            gradient_OG = gradient_OI.view(*step_code_OG.shape, self._group_size).sum(2)
            gradient_OG *= step_code_OG

            gradient_OX = gradient_OG.view(*scale_OX.shape, self._groups).sum(2)
            self.parameters[name].grad = gradient_OX * scale_OX
            weight_OI.grad = None

    @torch.no_grad()
    def update_weights(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            factor_OX = self.parameters[name].clamp_(*_FACTOR_RANGE)
            stored_OX = (scale_OX * factor_OX).half().float()

            step_OG = step_code_OG * _spread(stored_OX, self._groups)
            weight_OI = self.weights[name]
            weight_OI.copy_(code_OI.float() * _spread(step_OG, self._group_size))


def read_steps(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Return step_OG, the step of every group of weights on a grid."""
    return _read(weight_OI, grid, grid.steps, grid.GROUP_SIZE)


def _read(
    weight_OI: Tensor,
    grid: Grid,
    read_packed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    size: int,
) -> Tensor:
    O, I = weight_OI.shape
    if not O:  # this process has no rows of a small matrix
        return weight_OI.new_zeros(O, I // size)

    values_OI = weight_OI.detach().cpu().numpy().astype(np.float32)
    values = read_packed(grid.quantize(values_OI)).copy()
    return torch.from_numpy(values).to(weight_OI.device)


def compute_codes(weight_OI: Tensor, step_OG: Tensor, group_size: int) -> Tensor:
    """Return code_OI, integers in float32; 0 where the step is 0."""
    divisor_OG = torch.where(step_OG == 0, 1, step_OG)
    quotient_OI = weight_OI.detach() / _spread(divisor_OG, group_size)
    return quotient_OI.round_()


def _spread(value_OG: Tensor, group_size: int) -> Tensor:
    """Repeat the value of each group for its weights."""
    return value_OG.repeat_interleave(group_size, dim=1)
