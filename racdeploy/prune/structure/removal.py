"""Remove whole inputs of a linear, a few at a time, and let what stays make up for them.

Minimizes tr((W − T) H (W − T)ᵀ) where the removed columns of W are zero: what is removed next costs
tr(T_S (H⁻¹_SS)⁻¹ T_Sᵀ), S its columns, given all that went before.
Source: Optimal Brain Surgeon (Hassibi and Stork, 1993); for groups: ZipLM (arXiv 2302.04089).
"""

from __future__ import annotations

from functools import cached_property

import torch

from racdeploy.prune.structure.layout import Layout
from racdeploy.prune.structure.units import Units
from racdeploy.prune.walk.hessian import Hessian

BATCHES = 192
"""Least number of times that inputs are chosen anew on the way from all to none."""


class Removal(Units):
    """Inputs of a linear; what went is made up for when somebody asks what that costs."""

    def __init__(self, target_OI: torch.Tensor, hessian: Hessian, layout: Layout) -> None:
        at_once = max(1, layout.units // BATCHES)
        super().__init__(layout.units, layout.cohorts, at_once, target_OI.device)
        self._width = layout.widths[layout.letter]
        self._hessian = hessian
        self._target_OI = target_OI * ~hessian.dead_I
        self._weight_OI = self._target_OI.clone()
        self._pending: list[torch.Tensor] = []
        self._loss = 0.0

    @cached_property
    def _inverse_II(self) -> torch.Tensor:
        factor_II = self._hessian.inverse_factor_II
        return factor_II.T @ factor_II

    def remove(self, gone_U: torch.Tensor) -> None:
        super().remove(gone_U)
        self._pending.append(gone_U)

    def sizes(self) -> torch.Tensor:
        """Return the sum of squares of each unit's columns."""
        return self._target_OI.square().sum(0).view(-1, self._width).sum(1)

    def costs(self) -> torch.Tensor:
        """Return tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) of each unit's columns S."""
        weight_OI = self.full()
        width = self._width
        if width == 1:
            return weight_OI.square().sum(0) / self._inverse_II.diagonal()

        blocks = []
        for start in range(0, weight_OI.shape[1], width):
            own = slice(start, start + width)
            blocks.append(self._inverse_II[own, own])

        own_USS = torch.stack(blocks)
        weight_UOS = weight_OI.view(len(weight_OI), -1, width).transpose(0, 1)
        gram_USS = weight_UOS.mT @ weight_UOS
        solved_USS: torch.Tensor = torch.linalg.solve(own_USS, gram_USS)
        return solved_USS.diagonal(dim1=1, dim2=2).sum(1)

    def loss(self) -> float:
        """Return what the removal changes of the linear's mean squared output."""
        self.full()
        return self._loss

    def full(self) -> torch.Tensor:
        """Return the weights as they are now, (O, I), with zeros where inputs are gone."""
        for gone_U in self._pending:
            self._eliminate(self._columns(gone_U))
        self._pending.clear()
        return self._weight_OI

    def rest(self) -> torch.Tensor:
        """Return the weights of the inputs that stay as they were, (O, kept inputs)."""
        return self._target_OI[:, self._columns(self.kept_U.nonzero()[:, 0])]

    def solve(self) -> torch.Tensor:
        """Return the best weights for the inputs that stay, (O, kept inputs).

        Solved from the target at once, free of what rounding adds up to on the way.
        """
        kept_K = self._columns(self.kept_U.nonzero()[:, 0])
        H_II = self._hessian.matrix_II
        H_IK = H_II[:, kept_K]
        pull_OK = self._target_OI @ H_IK
        factor_KK = torch.linalg.cholesky(H_IK[kept_K])
        weight_KO: torch.Tensor = torch.cholesky_solve(pull_OK.T, factor_KK)
        return weight_KO.T.contiguous()

    def _columns(self, units_U: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(self._width, device=units_U.device)
        return (units_U[:, None] * self._width + inside).reshape(-1)

    def _eliminate(self, columns_S: torch.Tensor) -> None:
        """Take columns out of the weights and of the inverse, by Gaussian elimination."""
        rows_SI = self._inverse_II[columns_S]
        factor_SS = torch.linalg.cholesky(rows_SI[:, columns_S])

        # L⁻¹ H⁻¹_S: and W_S L⁻ᵀ, so that both updates are one product each.
        half_SI = torch.linalg.solve_triangular(factor_SS, rows_SI, upper=False)
        weight_OS = self._weight_OI[:, columns_S]
        half_OS = torch.linalg.solve_triangular(factor_SS, weight_OS.T, upper=False).T

        self._loss += float(half_OS.square().sum())

        self._weight_OI.addmm_(half_OS, half_SI, alpha=-1)
        self._inverse_II.addmm_(half_SI.T, half_SI, alpha=-1)

        # What is gone stays exactly zero, with a unit of its own on the diagonal.
        self._weight_OI[:, columns_S] = 0
        self._inverse_II[columns_S] = 0
        self._inverse_II[:, columns_S] = 0
        self._inverse_II[columns_S, columns_S] = 1
