"""Sparsity patterns: exact counts for unstructured sparsity, N kept of M for semi-structured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LinearSparsities = dict[str, float]
"""Linear → its sparsity, the share of its weights that become zeros."""


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere, ``sparsity`` of all; every pattern has these three methods."""

    sparsity: float

    def keep(self, score_OC: Tensor, column: int = 0, pruned_before: int = 0) -> Tensor:
        """Return keep_OC, True at the highest scores.

        Args:
            score_OC: scores of a slice of columns.
            column: first column of the slice.
            pruned_before: zeros in earlier columns; the count of zeros is exact up to this slice.
        """
        O, C = score_OC.shape
        target = round(self.sparsity * O * (column + C))
        count = min(max(target - pruned_before, 0), O * C)
        if not count:
            return torch.ones_like(score_OC, dtype=torch.bool)

        score_L = score_OC.flatten()
        threshold = torch.kthvalue(score_L, count).values
        keep_L = score_L > threshold

        # kthvalue leaves ties open: of weights at the threshold the first ones are pruned.
        equal_X = torch.nonzero(score_L == threshold).flatten()
        missing = count - int((score_L < threshold).sum())
        keep_L[equal_X[missing:]] = True
        return keep_L.view_as(score_OC)

    def keep_per_output(self, score_OI: Tensor) -> Tensor:
        """Return keep_OI with equally many zeros per row, up to one; exact in total."""
        O, I = score_OI.shape
        rows_O = torch.arange(1, O + 1, dtype=torch.float64)
        total_O = torch.round(rows_O * (self.sparsity * I)).long()
        count_O = torch.diff(total_O, prepend=total_O.new_zeros(1)).to(score_OI.device)

        # The inverse of a sorting permutation is the rank.
        order_OI = torch.argsort(score_OI, dim=1, stable=True)
        rank_OI = torch.argsort(order_OI, dim=1)
        return rank_OI >= count_O[:, None]

    def group_width(self, column_block: int) -> int:
        """Return the number of columns whose mask is chosen together."""
        return column_block


@dataclass(frozen=True)
class NOfM:
    """N:M sparsity: ``kept`` weights stay of every ``of`` consecutive inputs."""

    kept: int
    of: int

    def keep(self, score_OC: Tensor, column: int = 0, pruned_before: int = 0) -> Tensor:
        """Return keep_OC with exactly ``kept`` True in each group of ``of`` columns."""
        O, C = score_OC.shape
        score_OGS = score_OC.view(O, C // self.of, self.of)
        order_OGS = torch.argsort(score_OGS, dim=-1, descending=True, stable=True)
        keep_OGS = torch.zeros_like(score_OGS, dtype=torch.bool)
        best_OGX = order_OGS[..., : self.kept]
        keep_OGS.scatter_(-1, best_OGX, True)
        return keep_OGS.view(O, C)

    keep_per_output = keep  # groups lie within one row anyway

    def group_width(self, column_block: int) -> int:
        return self.of


@dataclass(frozen=True)
class ExistingZeros:
    """Zeros that a sparse linear has already, and no others."""

    kept_OI: Tensor

    def keep(self, score_OC: Tensor, column: int = 0, pruned_before: int = 0) -> Tensor:
        return self.kept_OI[:, column : column + score_OC.shape[1]]

    keep_per_output = keep

    def group_width(self, column_block: int) -> int:
        return column_block


Pattern = Unstructured | NOfM | ExistingZeros
