"""The Hessian of one input, damped, with the factors that the methods share."""

from __future__ import annotations

from functools import cached_property

import torch

from racdeploy.errors import EnvironmentFailure

__all__ = ["Hessian"]

DAMPING_STEP, DAMPING_STEPS = 10.0, 3


class Hessian:
    """Mean of x xᵀ over calibration tokens, with damping on its diagonal.

    Every factor is computed once, on first use, for all linears that share the input. Inputs that were never active
    (``dead_I``) get a unit diagonal; their weights are zero and stay so. ``norm_I`` is the root of each input's mean
    energy, without damping.

    Args:
        matrix_II: float32, symmetric; becomes the damped one.
        damping: share of the mean diagonal to add.

    Raises:
        EnvironmentFailure: on first use of a factor, where the matrix does not factor even with 1000 times the damping.
    """

    def __init__(self, matrix_II: torch.Tensor, damping: float) -> None:
        diagonal_I = matrix_II.diagonal()
        self.dead_I = diagonal_I == 0
        self.norm_I = diagonal_I.sqrt()
        self.matrix_II = matrix_II
        self.damping = damping
        self._asked, self._mean = damping, float(diagonal_I.mean())
        self._damp(damping)
        matrix_II.diagonal()[self.dead_I] = 1.0

    @cached_property
    def inverse_factor_II(self) -> torch.Tensor:
        """Upper Cholesky factor U of the inverse, H⁻¹ = Uᵀ U; raises ``damping`` stepwise where it takes more.

        With rows and columns reversed, H = L Lᵀ gives U = L⁻¹ reversed: the inverse itself is never formed.
        """
        for step in range(DAMPING_STEPS + 1):
            if step:
                more = self._asked * DAMPING_STEP**step
                self._damp(more - self.damping)
                self.damping = more
            lower_II, failed = torch.linalg.cholesky_ex(self.matrix_II.flip(0, 1))
            if not failed:
                inverse_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
                torch.linalg.solve_triangular(lower_II, inverse_II, upper=False, out=inverse_II)
                del lower_II
                return inverse_II.flip(0, 1)
        raise EnvironmentFailure(
            f"the Hessian does not factor, even with damping {self.damping:g}",
            remedy="collect more traces, or raise prune.damping in the recipe",
        )

    def solve(self, right_OI: torch.Tensor) -> torch.Tensor:
        """Return ``right_OI`` H⁻¹."""
        return right_OI @ self.inverse_factor_II.T @ self.inverse_factor_II

    @cached_property
    def scale_I(self) -> torch.Tensor:
        """Root of the damped diagonal: dividing by it gives every input unit energy."""
        return self.matrix_II.diagonal().sqrt()

    @cached_property
    def scaled_II(self) -> torch.Tensor:
        """The damped matrix with unit diagonal."""
        return self.matrix_II / self.scale_I[:, None] / self.scale_I

    @cached_property
    def eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and eigenvectors of :attr:`scaled_II`."""
        values_I, vectors_II = torch.linalg.eigh(self.scaled_II)
        return values_I, vectors_II

    def _damp(self, share: float) -> None:
        self.matrix_II.diagonal().add_(share * self._mean)
