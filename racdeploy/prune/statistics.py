"""What calibration gathers for one input: the Hessian, and how far the input has drifted from the dense model's.

H = Σ w x xᵀ over tokens, float32, w the weight of a token's stream (prompt, thinking, answer).
Source: SparseGPT (arXiv 2301.00774) section 3; streams follow RAC (arXiv 2509.12464); drift follows GPTAQ
(arXiv 2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from racdeploy.errors import UsageError
from racdeploy.prune.hessian import Hessian

__all__ = ["PAD", "InputStatistic"]

PAD = -1
SLICES, LEAST_SLICE = 8, 256


@dataclass
class InputStatistic:
    """Sums over the calibration tokens of one input.

    Args:
        width: number of inputs I.
        weights_S: weight of a token of each stream.
        match_dense: whether the drift is gathered.
    """

    width: int
    weights_S: torch.Tensor
    match_dense: bool
    hessian_II: torch.Tensor = field(init=False)
    drift_II: torch.Tensor | None = field(init=False)
    weight: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.hessian_II = torch.zeros(self.width, self.width)
        self.drift_II = torch.zeros(self.width, self.width) if self.match_dense else None

    def add(self, sparse_BTI: torch.Tensor, dense_BTI: torch.Tensor | None, stream_BT: torch.Tensor) -> None:
        """Add a batch; positions whose stream is ``PAD`` do not count.

        Args:
            sparse_BTI: the input in the partly pruned model.
            dense_BTI: the input in the dense model, where the drift is gathered.
            stream_BT: stream of each position.
        """
        real_BT = stream_BT != PAD
        weight_N = self.weights_S[stream_BT[real_BT]]
        root_N1 = weight_N.sqrt()[:, None]
        x_NI = sparse_BTI[real_BT].float().mul_(root_N1)
        for start, stop in self._slices():
            self.hessian_II[start:stop, start:].addmm_(x_NI[:, start:stop].T, x_NI[:, start:])
        self.weight += float(weight_N.sum())
        if self.drift_II is not None:
            assert dense_BTI is not None, "the drift needs the dense input"
            self.drift_II.addmm_(dense_BTI[real_BT].float().mul_(root_N1).sub_(x_NI).T, x_NI)

    def hessian(self, damping: float) -> Hessian:
        """Return the damped mean Hessian; the sum is given away.

        Raises:
            UsageError: no token counted.
        """
        if self.weight <= 0:
            raise UsageError(
                "no calibration token counts: the weight of every stream that the traces have is 0",
                remedy="raise prompt, thinking or answer under [calibration.weights]",
            )
        for start, stop in self._slices():
            self.hessian_II[stop:, start:stop] = self.hessian_II[start:stop, stop:].T
        return Hessian(self.hessian_II.div_(self.weight), damping)

    @property
    def importance_I(self) -> torch.Tensor:
        """Mean squared input of each column: the diagonal of the mean Hessian, before it is damped."""
        return self.hessian_II.diagonal() / self.weight

    def _slices(self) -> Iterator[tuple[int, int]]:
        """Yield the row slices of which only the part from the diagonal on is summed: half the work at large widths."""
        step = max(self.width // SLICES, LEAST_SLICE)
        for start in range(0, self.width, step):
            yield start, min(start + step, self.width)

    def target(self, weight_OI: torch.Tensor, hessian: Hessian) -> torch.Tensor:
        """Return the dense weights that give, on the drifted input, the dense model's output.

        Minimizes Σ w |W x_dense − T x|², damped towards W: T = W + W D (H + λ)⁻¹ with D = Σ w (x_dense − x) xᵀ.
        """
        if self.drift_II is None:
            return weight_OI
        return weight_OI + hessian.solve(weight_OI @ (self.drift_II / self.weight))
