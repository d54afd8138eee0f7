"""What the optimizer moves: weights, or what lies behind weights on the grid of a number format.

Where codes were chosen while pruning, the model learns as it will be stored. Weights are whole
codes times the step of their group, in every forward pass. Behind them, ``Codes`` has weights off
the grid, which get the gradients as if there were no rounding (straight-through, Bengio et al.,
arXiv 1308.3432); ``Scales`` keeps the codes and moves the scales, of which half precision has the
values.

Where processes have rows of the weights, each has the same rows of what lies behind them: quant
blocks lie along inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from racdeploy.prune.processes import ALONE, Processes
from racdeploy.quant import Grid, pins_largest

HELD_FROM = 0.75
"""Share of the steps after which codes are learned as they are stored."""

_GOLDEN, _OTHER = 0.6180339887498949, 0.7548776662466927  # no two columns or codes fall together
_WITHIN = 0.98  # of a step: what is not learned is rounded to what it was

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

    def show(self) -> None:
        """Set the weights to what a file would hold, for a look; :meth:`settle` goes on."""

    def hold(self) -> None:
        """Learn as the weights will be stored from now on, in steps that fit them as they are."""

    @property
    def on_grid(self) -> Mapping[str, torch.Tensor]:
        """Weights whose steps are no function of what is moved: a saved state needs them too."""
        return {}

    def take_steps(self) -> None:
        """Take the steps from weights that were read from a saved state, and hold them."""


class Codes(Weights):
    """Linears on a grid, their codes free to change; other weights are moved themselves.

    First the weights learn off the grid, and only a look rounds them, as the format does: they
    outgrow the steps that fitted them as they were pruned, and rounding every step makes noise.
    Once held, from the start where the format searches for scales, they learn as they are stored:
    the steps stay, and so does a code of the largest
    magnitude where the format finds a group's scale by it. A linear whose weights are on no grid,
    since it was not pruned, is moved itself.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        linears: Mapping[str, torch.Tensor],
        grid: Grid,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(weights)
        self._grid = grid
        self._largest = max(map(abs, grid.CODES)) if pins_largest(grid) else math.inf

        self._names: list[str] = []  # of the linears on the grid
        self._steps: dict[str, torch.Tensor] = {}  # by name, once held
        self._pinned: dict[str, torch.Tensor] = {}
        self.moved = dict(weights)

        for name, weight_OI in linears.items():
            step_OG, code_OI, exact = read_grid(weight_OI, grid)
            if all(processes.all(exact)):
                self._names.append(name)
                offset_OI = self._spread_out(code_OI) * _spread(step_OG, grid.GROUP_SIZE)
                self.moved[name] = weight_OI.detach() + offset_OI

        # A format that searches for scales would not find those that pruning chose.
        self._is_searched = not pins_largest(grid)
        if self._is_searched:
            self.take_steps()

    def gather(self) -> None:
        for name in self._names:
            weight_OI = self.weights[name]
            self.moved[name].grad, weight_OI.grad = weight_OI.grad, None

    @torch.no_grad()
    def settle(self) -> None:
        for name in self._names:
            weight_OI, moved_OI = self.weights[name], self.moved[name]
            if name not in self._steps:
                weight_OI.copy_(moved_OI)
                continue

            step_OG = self._steps[name]
            code_OI = codes_of(moved_OI, step_OG, self._grid.GROUP_SIZE)
            code_OI.clamp_(*self._grid.CODES)

            stored_OI = code_OI * _spread(step_OG, self._grid.GROUP_SIZE)
            stored_OI = torch.where(self._pinned[name], weight_OI, stored_OI)
            weight_OI.copy_(stored_OI)

    @torch.no_grad()
    def show(self) -> None:
        if not self._steps:
            self._round()

    def hold(self) -> None:
        if not self._is_searched:
            self._round()
            self.take_steps()

    @property
    def on_grid(self) -> Mapping[str, torch.Tensor]:
        return {name: self.weights[name] for name in self._steps}

    @torch.no_grad()
    def take_steps(self) -> None:
        for name in self._names:
            step_OG, code_OI, exact = read_grid(self.weights[name], self._grid)
            assert exact, "what a format stores, it finds again"
            self._steps[name] = step_OG
            self._pinned[name] = code_OI.abs() == self._largest

    def _spread_out(self, code_OI: torch.Tensor) -> torch.Tensor:
        """Return for each code an offset within half a step, spread evenly over a row's inputs.

        From the middle of its step every weight would have half a step to go before anything
        changed, and rounding would take back all that was learned. So a change of a tenth of a step
        changes a tenth of the codes. (It is dither, by multiples of the golden ratio.)
        """
        place_I = torch.arange(code_OI.shape[1], device=code_OI.device, dtype=torch.float64)
        turn_OI = place_I * _GOLDEN + code_OI.double() * _OTHER
        offset_OI = turn_OI - turn_OI.floor() - 0.5
        stays_OI = (code_OI == 0) | (code_OI.abs() == self._largest)
        return offset_OI.mul_(_WITHIN).masked_fill_(stays_OI, 0).float()

    @torch.no_grad()
    def _round(self) -> None:
        for name in self._names:
            self.weights[name].copy_(_store(self.moved[name], self._grid))


class Scales(Weights):
    """Linears on a grid, their scales free to change; other weights are moved themselves.

    What is moved is a factor of each scale: scales differ by orders of magnitude, and a learning
    rate fits only what is about 1. Steps of groups that share a scale move with it.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        linears: Mapping[str, torch.Tensor],
        grid: Grid,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__({**weights, **linears})
        self._group_size = grid.GROUP_SIZE
        self._groups = grid.BLOCK // grid.GROUP_SIZE
        self._codes: dict[str, torch.Tensor] = {}
        self._step_codes: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}
        self.moved = dict(weights)

        for name, weight_OI in linears.items():
            step_OG, code_OI, exact = read_grid(weight_OI, grid)
            if not all(processes.all(exact)):
                weight_OI.requires_grad_(False)
                continue

            scale_OX = read_scales(weight_OI, grid)  # X: blocks of a row
            self._scales[name] = scale_OX
            self._step_codes[name] = codes_of(step_OG, scale_OX, self._groups)
            self._codes[name] = code_OI.to(torch.int8)
            self.moved[name] = torch.ones_like(scale_OX)

    def gather(self) -> None:
        for name, code_OI in self._codes.items():
            weight_OI = self.weights[name]
            scale_OX, step_code_OG = self._scales[name], self._step_codes[name]
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
        for name, code_OI in self._codes.items():
            factor_OX = self.moved[name].clamp_(*_FACTORS)
            scale_OX = self._scales[name] * factor_OX
            stored_OX = scale_OX.half().float()

            step_OG = self._step_codes[name] * _spread(stored_OX, self._groups)
            weight_OI = self.weights[name]
            weight_OI.copy_(code_OI.float() * _spread(step_OG, self._group_size))


def read_grid(weight_OI: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return step_OG, code_OI, and whether these are the weights, to the last bit."""
    step_OG = read_steps(weight_OI, grid)
    code_OI = codes_of(weight_OI, step_OG, grid.GROUP_SIZE)
    exact = torch.equal(code_OI * _spread(step_OG, grid.GROUP_SIZE), weight_OI.detach())
    return step_OG, code_OI, exact


def read_steps(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return step_OG, the step of every group of weights that lie on a grid."""
    return _read(weight_OI, grid, grid.steps, grid.GROUP_SIZE)


def read_scales(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the scale of every quant block of weights that lie on a grid."""
    return _read(weight_OI, grid, grid.scales, grid.BLOCK)


def _store(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the weights as a file would hold them."""
    O, I = weight_OI.shape
    if not O:
        return weight_OI

    values_OI = weight_OI.detach().cpu().numpy().astype(np.float32)
    stored_OI = grid.dequantize(grid.quantize(values_OI), I).copy()
    return torch.from_numpy(stored_OI).to(weight_OI.device)


def _read(
    weight_OI: torch.Tensor,
    grid: Grid,
    of_packed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    size: int,
) -> torch.Tensor:
    O, I = weight_OI.shape
    if not O:  # of several processes, this one has no rows
        return weight_OI.new_zeros(O, I // size)

    values_OI = weight_OI.detach().cpu().numpy().astype(np.float32)
    found = of_packed(grid.quantize(values_OI)).copy()
    return torch.from_numpy(found).to(weight_OI.device)


def codes_of(weight_OI: torch.Tensor, step_OG: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return code_OI, whole numbers in float32; 0 where the step is."""
    divisor_OG = torch.where(step_OG == 0, 1, step_OG)
    quotient_OI = weight_OI.detach() / _spread(divisor_OG, group_size)
    return quotient_OI.round_()


def _spread(value_OG: torch.Tensor, group_size: int) -> torch.Tensor:
    """Give every weight what its group has."""
    return value_OG.repeat_interleave(group_size, dim=1)
