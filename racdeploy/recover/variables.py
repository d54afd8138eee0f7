"""What the optimizer moves: weights, or what lies behind weights on the grid of a number format.

Where codes were chosen while pruning, the model learns as it will be stored. Weights are whole
codes times the scale of their block, in every forward pass. Behind them, ``Codes`` has weights off
the grid, which get the gradients as if there were no rounding (straight-through, Bengio et al.,
arXiv 1308.3432); ``Scales`` keeps the codes and moves the scales, of which half precision has the
values.

Where processes have rows of the weights, each has the same rows of what lies behind them: quant
blocks lie along inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from racdeploy.prune.processes import ALONE, Processes
from racdeploy.quant import Grid

_FACTORS = (0.5, 2.0)
"""Of a scale: it keeps its sign, and half precision does not run out."""


class Weights:
    """Weights that the optimizer moves themselves."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights = self.moved = dict(weights)

    def gather(self) -> None:
        """Hand the gradients of the weights on to what is moved."""

    def settle(self) -> None:
        """Set the weights to what the moved values mean."""


class Codes(Weights):
    """Linears on a grid, their codes free to change; other weights are moved themselves.

    A code of the largest magnitude stays: by it the format finds the block's scale again. A linear
    whose weights are on no grid, since it was not pruned, is moved itself.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        linears: Mapping[str, torch.Tensor],
        grid: Grid,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(weights)
        self._codes = grid.CODES
        self._block = grid.BLOCK
        largest = max(map(abs, grid.CODES))

        self._steps: dict[str, torch.Tensor] = {}
        self._pinned: dict[str, torch.Tensor] = {}
        self.moved = dict(weights)

        for name, weight_OI in linears.items():
            step_OG, code_OI, exact = read_grid(weight_OI, grid)
            if not all(processes.all(exact)):
                continue

            self._steps[name] = step_OG
            self._pinned[name] = code_OI.abs() == largest
            self.moved[name] = weight_OI.detach().clone()

    def gather(self) -> None:
        for name, pinned_OI in self._pinned.items():
            weight_OI = self.weights[name]
            if weight_OI.grad is not None:
                self.moved[name].grad = weight_OI.grad.masked_fill_(pinned_OI, 0)
                weight_OI.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        for name, step_OG in self._steps.items():
            weight_OI = self.weights[name]
            code_OI = codes_of(self.moved[name], step_OG, self._block)
            code_OI.clamp_(*self._codes)

            stored_OI = code_OI * _spread(step_OG, self._block)
            stored_OI = torch.where(self._pinned[name], weight_OI, stored_OI)
            weight_OI.copy_(stored_OI)


class Scales(Weights):
    """Linears on a grid, their scales free to change; other weights are moved themselves.

    What is moved is a factor of each scale: scales differ by orders of magnitude, and a learning
    rate fits only what is about 1.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        linears: Mapping[str, torch.Tensor],
        grid: Grid,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__({**weights, **linears})
        self._block = grid.BLOCK
        self._codes: dict[str, torch.Tensor] = {}
        self._steps: dict[str, torch.Tensor] = {}
        self.moved = dict(weights)

        for name, weight_OI in linears.items():
            step_OG, code_OI, exact = read_grid(weight_OI, grid)
            if not all(processes.all(exact)):
                weight_OI.requires_grad_(False)
                continue

            self._steps[name] = step_OG
            self._codes[name] = code_OI.to(torch.int8)
            self.moved[name] = torch.ones_like(step_OG)

    def gather(self) -> None:
        for name, code_OI in self._codes.items():
            weight_OI = self.weights[name]
            step_OG = self._steps[name]
            if weight_OI.grad is None:
                continue

            slope_OI = weight_OI.grad * code_OI
            slope_OG = slope_OI.view(*step_OG.shape, self._block).sum(2)
            self.moved[name].grad = slope_OG * step_OG
            weight_OI.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        for name, code_OI in self._codes.items():
            factor_OG = self.moved[name].clamp_(*_FACTORS)
            step_OG = self._steps[name] * factor_OG
            stored_OG = step_OG.half().float()

            weight_OI = self.weights[name]
            weight_OI.copy_(code_OI.float() * _spread(stored_OG, self._block))


def read_grid(weight_OI: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return step_OG, code_OI, and whether these are the weights, to the last bit."""
    step_OG = read_steps(weight_OI, grid)
    code_OI = codes_of(weight_OI, step_OG, grid.BLOCK)
    exact = torch.equal(code_OI * _spread(step_OG, grid.BLOCK), weight_OI.detach())
    return step_OG, code_OI, exact


def read_steps(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return step_OG, the scale of every block of weights that lie on a grid."""
    O, I = weight_OI.shape
    if not O:  # of several processes, this one has no rows
        return weight_OI.new_zeros(O, I // grid.BLOCK)

    values_OI = weight_OI.detach().cpu().numpy().astype(np.float32)
    steps = grid.steps(grid.quantize(values_OI)).copy()
    return torch.from_numpy(steps).to(weight_OI.device)


def codes_of(weight_OI: torch.Tensor, step_OG: torch.Tensor, block: int) -> torch.Tensor:
    """Return code_OI, whole numbers in float32; 0 where the scale is."""
    divisor_OG = torch.where(step_OG == 0, 1, step_OG)
    quotient_OI = weight_OI.detach() / _spread(divisor_OG, block)
    return quotient_OI.round_()


def _spread(value_OG: torch.Tensor, block: int) -> torch.Tensor:
    """Give every weight what its block has."""
    return value_OG.repeat_interleave(block, dim=1)
