"""Remove whole inputs of a linear, a few at a time, and let what stays make up for them.

Minimizes tr((W − T) H (W − T)ᵀ) where the removed columns of W are zero: what is removed next costs
tr(T_S (H⁻¹_SS)⁻¹ T_Sᵀ), S its columns, given all that went before.
Source: Optimal Brain Surgeon (Hassibi and Stork, 1993); for groups: ZipLM (arXiv 2302.04089).
"""

from __future__ import annotations

import torch

from racdeploy.prune.hessian import Hessian
from racdeploy.prune.layout import Layout

BATCHES = 192
"""Least number of times that inputs are chosen anew on the way from all to none."""


class Removal:
    """A linear that loses inputs; :attr:`loss` is what that changes of its mean squared output."""

    def __init__(
        self,
        target_OI: torch.Tensor,
        hessian: Hessian,
        layout: Layout,
        *,
        by_magnitude: bool = False,  # the smallest go, and nothing makes up for them
    ) -> None:
        self._layout, self._hessian, self._by_magnitude = layout, hessian, by_magnitude
        self._target_OI = target_OI * ~hessian.dead_I

        self.kept_U = torch.ones(layout.units, dtype=torch.bool, device=target_OI.device)
        self.loss = 0.0

        if not by_magnitude:
            factor_II = hessian.inverse_factor_II
            self._weight_OI = self._target_OI.clone()
            self._inverse_II = factor_II.T @ factor_II

    def shrink(self, count: int) -> None:
        """Remove the units that are missed least, until so many are left."""
        left = int(self.kept_U.sum()) - count
        cohorts = self._layout.cohorts

        most = max(1, self._layout.units // BATCHES) * cohorts
        if self._by_magnitude:
            most = left

        while left:
            costs_U = self._costs()
            batch_U = _choose(costs_U, min(left, most) // cohorts, cohorts)
            self.kept_U[batch_U] = False
            left -= len(batch_U)

            if not self._by_magnitude:
                self._eliminate(batch_U)

    @property
    def kept(self) -> list[int]:
        """Numbers of the units that are left."""
        units: list[int] = self.kept_U.cpu().nonzero()[:, 0].tolist()
        return units

    def keep(self, kept_U: torch.Tensor) -> None:
        """Remove all but the units of these numbers."""
        self.kept_U[:] = False
        self.kept_U[kept_U] = True

    def solve(self) -> torch.Tensor:
        """Return the best weights for the inputs that stay, (O, kept inputs).

        Solved from the target at once, free of what rounding adds up to on the way.
        """
        kept_K = self._columns(self.kept_U.nonzero()[:, 0])
        if self._by_magnitude:
            return self._target_OI[:, kept_K]

        H_II = self._hessian.matrix_II
        H_IK = H_II[:, kept_K]
        pull_OK = self._target_OI @ H_IK
        factor_KK = torch.linalg.cholesky(H_IK[kept_K])
        weight_KO: torch.Tensor = torch.cholesky_solve(pull_OK.T, factor_KK)
        return weight_KO.T.contiguous()

    def full(self) -> torch.Tensor:
        """Return the weights as they are now, (O, I), with zeros where inputs are gone."""
        return self._weight_OI

    @property
    def _width(self) -> int:
        return self._layout.widths[self._layout.letter]

    def _columns(self, units_U: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(self._width, device=units_U.device)
        return (units_U[:, None] * self._width + inside).reshape(-1)

    def _costs(self) -> torch.Tensor:
        """Return what the removal of each unit costs now; of one that is gone, infinity."""
        U, width = self._layout.units, self._width

        if self._by_magnitude:
            energy_I = self._target_OI.square().sum(0)
            costs_U = energy_I.view(U, width).sum(1)
        elif width == 1:
            costs_U = self._weight_OI.square().sum(0) / self._inverse_II.diagonal()
        else:
            costs_U = self._costs_of_groups()

        return costs_U.masked_fill(~self.kept_U, torch.inf)

    def _costs_of_groups(self) -> torch.Tensor:
        """Return tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) of each unit's columns S."""
        U, width = self._layout.units, self._width

        blocks = []
        for start in range(0, U * width, width):
            own = slice(start, start + width)
            blocks.append(self._inverse_II[own, own])

        own_USS = torch.stack(blocks)
        weight_UOS = self._weight_OI.view(-1, U, width).transpose(0, 1)
        gram_USS = weight_UOS.mT @ weight_UOS
        solved_USS: torch.Tensor = torch.linalg.solve(own_USS, gram_USS)
        return solved_USS.diagonal(dim1=1, dim2=2).sum(1)

    def _eliminate(self, batch_U: torch.Tensor) -> None:
        """Take columns out of the weights and of the inverse, by Gaussian elimination."""
        columns_S = self._columns(batch_U)
        rows_SI = self._inverse_II[columns_S]
        factor_SS = torch.linalg.cholesky(rows_SI[:, columns_S])

        # L⁻¹ H⁻¹_S: and W_S L⁻ᵀ, so that both updates are one product each.
        half_SI = torch.linalg.solve_triangular(factor_SS, rows_SI, upper=False)
        weight_OS = self._weight_OI[:, columns_S]
        half_OS = torch.linalg.solve_triangular(factor_SS, weight_OS.T, upper=False).T

        self.loss += float(half_OS.square().sum())

        self._weight_OI.addmm_(half_OS, half_SI, alpha=-1)
        self._inverse_II.addmm_(half_SI.T, half_SI, alpha=-1)

        # What is gone stays exactly zero, with a unit of its own on the diagonal.
        self._weight_OI[:, columns_S] = 0
        self._inverse_II[columns_S] = 0
        self._inverse_II[:, columns_S] = 0
        self._inverse_II[columns_S, columns_S] = 1


def _choose(costs_U: torch.Tensor, each: int, cohorts: int) -> torch.Tensor:
    """Return the cheapest units, as many of each cohort."""
    costs_CX = costs_U.view(cohorts, -1)
    cheapest_CX = torch.argsort(costs_CX, dim=1, stable=True)[:, : max(1, each)]
    starts_C1 = torch.arange(cohorts, device=costs_U.device)[:, None] * costs_CX.shape[1]
    chosen_CX: torch.Tensor = starts_C1 + cheapest_CX
    return chosen_CX.reshape(-1)
