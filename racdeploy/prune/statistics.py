"""What calibration gathers for one input: the Hessian, and how far the input has drifted from the dense model's.

H = Σ w x xᵀ over tokens, w the weight of a token's stream (prompt, thinking, answer). The product of a batch is
float32, the sum over batches float64, rounded to float32 once: adding float32 numbers in float64 is exact but for
magnitudes more than 2²² apart, so the sum does not depend on the order of the batches, or on who added them.
Source: SparseGPT (arXiv 2301.00774) section 3; streams follow RAC (arXiv 2509.12464); drift follows GPTAQ
(arXiv 2504.02692).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from racdeploy.errors import UsageError
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.processes import Processes

PAD = -1
SLICES, LEAST_SLICE = 8, 256


@dataclass
class InputStatistic:
    """Sums over the calibration tokens of one input.

    Args:
        width: number of inputs I.
        weights_S: weight of a token of each stream, on the device where the sums are kept.
        match: dense weights of the linears that are solved for the dense model's output; none gathers no drift.

    After :meth:`share`, ``weight`` is that of all tokens and ``importance_I`` the mean squared input of each column.
    """

    width: int
    weights_S: torch.Tensor
    match: Sequence[torch.Tensor] = ()
    weight: float = field(init=False)
    importance_I: torch.Tensor = field(init=False)
    _sums: list[torch.Tensor] = field(init=False)
    _drift: torch.Tensor = field(init=False)
    _weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._sums = [
            self.weights_S.new_zeros(stop - start, self.width - start, dtype=torch.float64)
            for start, stop in self._slices()
        ]
        rows = sum(len(weight_OI) for weight_OI in self.match)
        self._projected = (
            2 * rows <= self.width
        )  # W D is then cheaper to gather than D, and smaller
        size = (rows if self._projected else self.width, self.width) if self.match else (0, 0)
        self._drift = self.weights_S.new_zeros(size, dtype=torch.float64)
        self._weight = self.weights_S.new_zeros((), dtype=torch.float64)

    def add(
        self, sparse_BTI: torch.Tensor, dense_BTI: torch.Tensor | None, stream_BT: torch.Tensor
    ) -> None:
        """Add a batch; positions whose stream is ``PAD`` do not count.

        Args:
            sparse_BTI: the input in the partly pruned model.
            dense_BTI: the input in the dense model, where the drift is gathered.
            stream_BT: stream of each position.
        """
        stream_BT = stream_BT.to(self.weights_S.device)
        real_BT = stream_BT != PAD
        weight_N = self.weights_S[stream_BT[real_BT]]
        root_N1 = weight_N.sqrt()[:, None]
        x_NI = sparse_BTI[real_BT].float().mul_(root_N1)
        for (start, stop), sum_CI in zip(self._slices(), self._sums, strict=True):
            sum_CI += x_NI[:, start:stop].T @ x_NI[:, start:]
        self._weight += weight_N.sum(dtype=torch.float64)
        if self.match:
            assert dense_BTI is not None, "the drift needs the dense input"
            delta_NI = dense_BTI[real_BT].float().mul_(root_N1).sub_(x_NI)
            delta_NR = (
                torch.cat([delta_NI @ w_OI.T for w_OI in self.match], 1)
                if self._projected
                else delta_NI
            )
            for start, stop in self._slices(delta_NR.shape[1]):
                self._drift[start:stop] += delta_NR[:, start:stop].T @ x_NI

    def share(self, processes: Processes, owners: Sequence[int]) -> None:
        """Add up what the processes of a job gathered, in those that own a linear; the others' sums are given away."""
        energy_I = torch.cat([sum_CI.diagonal() for sum_CI in self._sums])
        for part in (*self._sums, self._drift):
            processes.total(part, owners)
        for part in (energy_I, self._weight):
            processes.total(part)
        self.weight = float(self._weight)
        self.importance_I = (energy_I / self._weight).float()
        if processes.rank not in owners:
            self._sums.clear()
            self._drift = self._drift.new_empty(0, 0)

    def hessian(self, damping: float) -> Hessian:
        """Return the damped mean Hessian; the sum is given away.

        Raises:
            UsageError: no token counted.
        """
        if self._weight <= 0:
            raise UsageError(
                "no calibration token counts: the weight of every stream that the traces have is 0",
                remedy="raise prompt, thinking or answer under [calibration.weights]",
            )
        matrix_II = self.weights_S.new_empty(self.width, self.width, dtype=torch.float32)
        for start, stop in self._slices():
            matrix_II[start:stop, start:] = self._sums.pop(0).div_(self._weight)
            matrix_II[stop:, start:stop] = matrix_II[start:stop, stop:].T
        return Hessian(matrix_II, damping)

    def targets(self, indices: Sequence[int], hessian: Hessian) -> dict[int, torch.Tensor]:
        """Return dense weights that give, on the drifted input, the dense model's output; the drift is given away.

        Minimizes Σ w |W x_dense − T x|², damped towards W: T = W + W D (H + λ)⁻¹ with D = Σ w (x_dense − x) xᵀ.

        Args:
            indices: which of ``match``.
            hessian: of this input.
        """
        drift_RI = self._drift.div_(self._weight).float()
        del self._drift
        starts = list(itertools.accumulate((len(weight_OI) for weight_OI in self.match), initial=0))
        found = {}
        for index in indices:
            weight_OI = self.match[index]
            part_OI = (
                drift_RI[starts[index] : starts[index + 1]]
                if self._projected
                else weight_OI @ drift_RI
            )
            found[index] = weight_OI + hessian.solve(part_OI)
        return found

    def _slices(self, rows: int = 0) -> Iterator[tuple[int, int]]:
        """Yield row slices; of the Hessian only the part from the diagonal on is summed, half the work when wide."""
        rows = rows or self.width
        step = max(rows // SLICES, LEAST_SLICE)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)
