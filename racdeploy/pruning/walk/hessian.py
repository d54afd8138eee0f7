"""The damped Hessian of one input, with the factorizations that the methods share."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from racdeploy.errors import EnvironmentFailure

DAMPING_FACTOR, MAX_DAMPING_STEPS = 10.0, 3
_SLAB_COLUMNS = 256  # inverted together: small copies, and products at full speed
_CHUNK_VALUES = 1 << 20  # swapped together, through a copy of 4 MB


class Hessian:
    """Mean of x xᵀ over calibration tokens, with ``damping`` times its mean diagonal on top.

    Every factor is computed once, on first use, for all linears that share the input.
    """

    def __init__(self, matrix_II: Tensor, damping: float) -> None:
        diagonal_I = matrix_II.diagonal()
        self.dead_I = diagonal_I == 0  # never active: unit diagonal; weights are zero and stay so
        self.norm_I = diagonal_I.sqrt()  # root of each input's mean energy, without damping
        self.matrix_II = matrix_II  # float32, symmetric, contiguous; becomes the damped one
        self.damping = damping
        self._requested = damping
        self._mean = float(diagonal_I.mean())
        self._damp(damping)
        matrix_II.diagonal()[self.dead_I] = 1.0

    @cached_property
    def inverse_factor_II(self) -> Tensor:
        """Upper Cholesky factor U of the inverse, H⁻¹ = Uᵀ U.

        With rows and columns reversed, H = L Lᵀ gives U = L⁻¹ reversed, so one matrix is enough.
        If H does not factor, ``damping`` is raised step by step, up to 1000 times.
        """
        for step in range(MAX_DAMPING_STEPS + 1):
            if step:
                more = self._requested * DAMPING_FACTOR**step
                self._damp(more - self.damping)
                self.damping = more

            # In place, without a third matrix: what LAPACK writes as Lᵀ by columns is L by rows.
            factor_II = self.matrix_II.flip(0, 1)
            transposed_II = factor_II.mT
            failed = torch.empty((), dtype=torch.int32, device=factor_II.device)
            torch.linalg.cholesky_ex(transposed_II, upper=True, out=(transposed_II, failed))

            if not failed:
                _invert_lower(factor_II)
                _reverse(factor_II.view(-1))
                return factor_II

            del factor_II, transposed_II  # free the memory before the next attempt

        raise EnvironmentFailure(
            "hessian-not-factored",
            f"the Hessian does not factor, even with damping {self.damping:g}",
            remedy="collect more traces, or raise prune.damping in the recipe",
        )

    def solve(self, right_OI: Tensor) -> Tensor:
        factor_II = self.inverse_factor_II
        return right_OI @ factor_II.T @ factor_II

    def energy(self, weight_OI: Tensor) -> float:
        """Return the mean squared output of weights, tr(W H Wᵀ), summed over outputs."""
        product_OI = weight_OI @ self.matrix_II
        return float((product_OI * weight_OI).sum())

    @cached_property
    def scale_I(self) -> Tensor:
        """Root of the damped diagonal; inputs divided by it have unit energy."""
        return self.matrix_II.diagonal().sqrt()

    @cached_property
    def scaled_II(self) -> Tensor:
        return self.matrix_II / self.scale_I[:, None] / self.scale_I

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of :attr:`scaled_II`."""
        values_I, vectors_II = torch.linalg.eigh(self.scaled_II)
        return values_I, vectors_II

    def _damp(self, share: float) -> None:
        diagonal_I = self.matrix_II.diagonal()
        diagonal_I += share * self._mean


def _invert_lower(lower_II: Tensor) -> None:
    """Invert a lower triangular matrix in place, slab by slab. Source: LAPACK's ``trtri``."""
    I = len(lower_II)
    for start in reversed(range(0, I, _SLAB_COLUMNS)):
        stop = min(start + _SLAB_COLUMNS, I)
        slab_XC = lower_II[:, start:stop]
        diagonal_CC = slab_XC[start:stop]
        one_CC = torch.ones_like(diagonal_CC[0]).diag()
        diagonal_CC.copy_(torch.linalg.solve_triangular(diagonal_CC, one_CC, upper=False))

        # Below: −(inverse below right, which is finished) × slab × inverse of the diagonal part.
        below_XC = slab_XC[stop:] @ diagonal_CC

        for row in range(stop, I, _SLAB_COLUMNS):
            end = min(row + _SLAB_COLUMNS, I)
            inverse_CX = lower_II[row:end, stop:end]
            slab_XC[row:end] = -(inverse_CX @ below_XC[: end - stop])


def _reverse(values_L: Tensor) -> None:
    """Reverse the order of the values in place, a chunk from either end at a time."""
    count = len(values_L)
    for start in range(0, count // 2, _CHUNK_VALUES):
        stop = min(start + _CHUNK_VALUES, count // 2)
        front_L = values_L[start:stop]
        back_L = values_L[count - stop : count - start]

        reversed_back_L = back_L.flip(0)
        back_L.copy_(front_L.flip(0))
        front_L.copy_(reversed_back_L)
