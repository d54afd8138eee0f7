"""Removal of whole inputs of a linear, compensated by the inputs that stay.

Minimizes tr((W − T) H (W − T)ᵀ) with the removed columns of W zero. Removing a unit with columns S
costs tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ), where W and H⁻¹ are updated for all units removed before.
Source: Optimal Brain Surgeon (Hassibi and Stork, 1993); for groups: ZipLM (arXiv 2302.04089).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.structure.prunable_units import PrunableUnits
from racdeploy.pruning.walk.hessian import Hessian

MIN_ROUNDS = 192
"""Minimum number of rounds from all inputs to none; costs are computed again in each."""


class InputUnits(PrunableUnits):
    """Inputs of a linear as units; removed ones are compensated when costs or weights are read."""

    def __init__(self, target_OI: Tensor, hessian: Hessian, layout: UnitLayout) -> None:
        units_per_round = max(1, layout.units // MIN_ROUNDS)
        super().__init__(layout.units, layout.cohorts, units_per_round, target_OI.device)
        self._width = layout.widths[layout.letter]
        self._hessian = hessian
        self._target_OI = target_OI * ~hessian.dead_I
        self._weight_OI = self._target_OI.clone()
        self._pending: list[Tensor] = []
        self._loss = 0.0

    @cached_property
    def _inverse_II(self) -> Tensor:
        factor_II = self._hessian.inverse_factor_II
        del self._hessian.inverse_factor_II  # as large as the Hessian, and not needed again
        return factor_II.T @ factor_II

    def remove(self, removed_U: Tensor) -> None:
        super().remove(removed_U)
        self._pending.append(removed_U)

    def sizes(self) -> Tensor:
        """Return the sum of squares of each unit's columns."""
        return self._target_OI.square().sum(0).view(-1, self._width).sum(1)

    def costs(self) -> Tensor:
        """Return tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) of each unit's columns S."""
        weight_OI = self.weights_with_zeros()
        width = self._width
        if width == 1:
            return weight_OI.square().sum(0) / self._inverse_II.diagonal()

        blocks = []
        for start in range(0, weight_OI.shape[1], width):
            unit = slice(start, start + width)
            blocks.append(self._inverse_II[unit, unit])

        inverse_USS = torch.stack(blocks)
        weight_UOS = weight_OI.view(len(weight_OI), -1, width).transpose(0, 1)
        gram_USS = weight_UOS.mT @ weight_UOS
        solved_USS: Tensor = torch.linalg.solve(inverse_USS, gram_USS)
        return solved_USS.diagonal(dim1=1, dim2=2).sum(1)

    def loss(self) -> float:
        """Return the mean squared change of the linear's output by all removals."""
        self.weights_with_zeros()
        return self._loss

    def weights_with_zeros(self) -> Tensor:
        """Return the compensated weights, (O, I), zero where inputs were removed."""
        for removed_U in self._pending:
            # Gaussian elimination, of the weights and of the inverse.
            columns_S = self._columns(removed_U)
            rows_SI = self._inverse_II[columns_S]
            factor_SS = torch.linalg.cholesky(rows_SI[:, columns_S])

            # L⁻¹ H⁻¹_S: and W_S L⁻ᵀ, with which each update is one product.
            half_SI = torch.linalg.solve_triangular(factor_SS, rows_SI, upper=False)
            weight_OS = self._weight_OI[:, columns_S]
            half_OS = torch.linalg.solve_triangular(factor_SS, weight_OS.T, upper=False).T

            self._loss += float(half_OS.square().sum())

            self._weight_OI.addmm_(half_OS, half_SI, alpha=-1)
            self._inverse_II.addmm_(half_SI.T, half_SI, alpha=-1)

            # Removed columns stay exactly zero; a 1 on the diagonal keeps the inverse regular.
            self._weight_OI[:, columns_S] = 0
            self._inverse_II[columns_S] = 0
            self._inverse_II[:, columns_S] = 0
            self._inverse_II[columns_S, columns_S] = 1
        self._pending.clear()
        return self._weight_OI

    def kept_weights(self, *, optimal: bool) -> Tensor:
        """Return the weights of the kept inputs, (O, kept inputs): optimal or the target's."""
        kept_K = self._columns(self.kept_U.nonzero()[:, 0])
        if not optimal:
            return self._target_OI[:, kept_K]

        # Solved once from the target, without the rounding errors of the stepwise updates.
        H_II = self._hessian.matrix_II
        H_IK = H_II[:, kept_K]
        pull_OK = self._target_OI @ H_IK
        factor_KK = torch.linalg.cholesky(H_IK[kept_K])
        weight_KO: Tensor = torch.cholesky_solve(pull_OK.T, factor_KK)
        return weight_KO.T.contiguous()

    def _columns(self, units_U: Tensor) -> Tensor:
        offsets_X = torch.arange(self._width, device=units_U.device)
        return (units_U[:, None] * self._width + offsets_X).reshape(-1)
