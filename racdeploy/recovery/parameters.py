"""Trainable parameters: weights, or the scales of weights on the grid of a number format.

``ScaleParameters`` freezes the codes and trains the scales. In every forward pass weights are
integer codes times the step of their group, with scales rounded to half precision; gradients ignore
the rounding (straight-through estimator, Bengio et al., arXiv 1308.3432).

A process that has some rows of the weights has the same rows of the scales: quant blocks lie along
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from racdeploy.pruning.job_share import WHOLE_SHARE, JobShare
from racdeploy.quant import load_grid
from racdeploy.quant.grid import Grid, GridCodes
from racdeploy.quant.stored_codes import CodedWeight

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
    """Trained scales of linears with chosen codes; other weights are trained directly.

    The parameter is a factor of each scale, about 1: scales differ by orders of magnitude, so no
    learning rate would fit them all. All groups of a quant block change with its scale. Linears
    are frozen whose codes have another order than the model or a factor, minima of their own, or
    scales that cannot take any value.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        coded: Mapping[str, CodedWeight],  # codes of some of them
        share: JobShare = WHOLE_SHARE,
    ) -> None:
        super().__init__(weights)
        # Per linear: its codes, its groups' step codes, and its initial scales.
        self._grids: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.parameters = {name: each for name, each in weights.items() if name not in coded}

        for name, entry in coded.items():
            weight_OI, grid = weights[name], load_grid(entry.quant)
            whole = _list_signed(entry.read_codes(), grid) if share.has_files else None
            # This process' rows of codes, step codes and scales.
            O, I = weight_OI.shape
            parts = []
            if share.run_once(partial(bool, whole)):
                for index, columns in enumerate((I, I // grid.group_size, I // grid.block_size)):
                    rows = whole[index] if whole else None
                    parts.append(share.scatter_rows(rows, weight_OI.new_empty(O, columns)))

            exact = bool(parts) and torch.equal(_multiply(*parts), weight_OI.detach())
            # All processes must agree, or the shards of a linear would be trained differently.
            if not share.agree(exact):
                weight_OI.requires_grad_(False)
                continue

            code_OI, step_code_OG, scale_OX = parts
            self._grids[name] = code_OI.to(torch.int8), step_code_OG, scale_OX
            self.parameters[name] = torch.ones_like(scale_OX)

    def propagate_gradients(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            weight_OI = self.weights[name]
            if weight_OI.grad is None:
                continue

            # Chain rule of weight = code · step code · (scale · factor), summed over each block.
            gradient_OI = weight_OI.grad * code_OI
            gradient_OG = _sum_groups(gradient_OI, step_code_OG) * step_code_OG
            gradient_OX = _sum_groups(gradient_OG, scale_OX)
            self.parameters[name].grad = gradient_OX * scale_OX
            weight_OI.grad = None

    @torch.no_grad()
    def update_weights(self) -> None:
        for name, (code_OI, step_code_OG, scale_OX) in self._grids.items():
            factor_OX = self.parameters[name].clamp_(*_FACTOR_RANGE)
            stored_OX = (scale_OX * factor_OX).half().float()

            self.weights[name].copy_(_multiply(code_OI, step_code_OG, stored_OX))


def _list_signed(codes: GridCodes, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return codes in steps from zero, step codes and scales.

    None if minima are not zero's, or a scale is not any half-precision number.
    """
    if grid.scale != "half":
        return None

    value_OI = np.array(grid.values, np.float32)[codes.code_OI]
    step_code_OG = codes.step_code_OG
    if step_code_OG is None:
        step_code_OG = np.ones_like(codes.scale_OX, np.int16)

    if codes.minimum_code_OG is not None and codes.minimum_scale_OX is not None:
        middle = np.float32(len(grid.values) // 2)
        is_shifted = np.array_equal(codes.minimum_code_OG, step_code_OG)
        if not is_shifted or not np.array_equal(codes.minimum_scale_OX, codes.scale_OX * middle):
            return None
        value_OI = value_OI - middle

    arrays = value_OI, step_code_OG.astype(np.float32), codes.scale_OX.astype(np.float32)
    code_OI, step_OG, scale_OX = map(torch.from_numpy, arrays)
    return code_OI, step_OG, scale_OX


def _multiply(code_OI: Tensor, step_code_OG: Tensor, scale_OX: Tensor) -> Tensor:
    step_OG = step_code_OG * _spread(scale_OX, step_code_OG)
    return code_OI.float() * _spread(step_OG, code_OI)


def _sum_groups(value_OI: Tensor, like: Tensor) -> Tensor:
    """Sum the values of each group, to as many as ``like`` has; rows may be none."""
    O, G = like.shape
    return value_OI.view(O, G, value_OI.shape[1] // G).sum(2)


def _spread(value_OG: Tensor, like: Tensor) -> Tensor:
    """Repeat the value of each group for its weights, as many as ``like`` has."""
    return value_OG.repeat_interleave(like.shape[1] // value_OG.shape[1], dim=1)
