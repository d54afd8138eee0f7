"""What calibration gathers for one input: the Hessian, and the drift from the dense model's input.

H = Σ w x xᵀ over tokens, w the weight of a token's stream. A batch's product is float32, the sum
float64: exact but for magnitudes more than 2²² apart, so in any order, and whoever adds.
Source: SparseGPT (arXiv 2301.00774) section 3; streams: RAC (2509.12464); GPTAQ (2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from racdeploy.errors import UsageError
from racdeploy.prune.processes import Processes
from racdeploy.prune.walk.hessian import Hessian

PAD = -1
# Of each slice of rows the part from the diagonal on is summed; narrower ones make slow products.
SLICES, LEAST_SLICE = 8, 256


@dataclass
class InputStatistic:
    """Sums over the calibration tokens of one input."""

    width: int
    weights_R: torch.Tensor  # of a token of each stream, on the device where the sums are kept
    match: Sequence[torch.Tensor] = ()  # weights of linears that are solved for the dense output
    dense: Sequence[torch.Tensor] = ()  # what makes that output, where it has more inputs
    weight: float = field(init=False)  # after :meth:`share`: of all tokens
    importance_I: torch.Tensor = field(init=False)  # after :meth:`share`: mean squared input

    def __post_init__(self) -> None:
        I = self.width
        outputs = sum(map(len, self.match))
        self._projected = bool(self.dense) or 2 * outputs <= I  # W D then takes less time, too
        rows = outputs if self._projected else I

        zeros = partial(self.weights_R.new_zeros, dtype=torch.float64)
        self._weight = zeros(())
        # W D, a row per output, where smaller than D.
        self._drift = zeros(rows if self.match else 0, I)
        self._sums = [zeros(stop - start, I - start) for start, stop in _slices(I)]

    def add(
        self, sparse_BTI: torch.Tensor, dense_BTI: torch.Tensor | None, stream_BT: torch.Tensor
    ) -> None:
        """Add a batch's input (``PAD`` does not count), and the dense model's for the drift."""
        stream_BT = stream_BT.to(self.weights_R.device)
        real_BT = stream_BT != PAD
        weight_N = self.weights_R[stream_BT[real_BT]]
        self._weight += weight_N.sum(dtype=torch.float64)

        # The root of the weight goes into both factors of the product.
        root_N1 = weight_N.sqrt()[:, None]
        x_NI = sparse_BTI[real_BT].float().mul_(root_N1)

        for (start, stop), sum_CX in zip(_slices(self.width), self._sums, strict=True):
            rows_CN = x_NI[:, start:stop].T
            sum_CX += rows_CN @ x_NI[:, start:]

        if not self.match:
            return

        assert dense_BTI is not None, "the drift needs the dense input"
        delta_NX = self._make_delta(dense_BTI[real_BT].float().mul_(root_N1), x_NI)

        for start, stop in _slices(delta_NX.shape[1]):
            rows_CN = delta_NX[:, start:stop].T
            self._drift[start:stop] += rows_CN @ x_NI

    def _make_delta(self, dense_NI: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
        """Return what is missing of the dense input, or of the dense outputs."""
        if self.dense:
            own = [x_NI @ weight_OI.T for weight_OI in self.match]
            wanted = [dense_NI @ weight_OJ.T for weight_OJ in self.dense]
            return torch.cat(wanted, 1) - torch.cat(own, 1)

        delta_NI = dense_NI - x_NI
        if not self._projected:
            return delta_NI
        return torch.cat([delta_NI @ weight_OI.T for weight_OI in self.match], 1)

    def share(self, processes: Processes, owners: Sequence[int]) -> None:
        """Add up what the processes of a job gathered; only owners of a linear keep the sums."""
        energy_I = torch.cat([sum_CX.diagonal() for sum_CX in self._sums])
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
        """Return the damped mean Hessian; the sum is freed on the way."""
        if self._weight <= 0:
            raise UsageError(
                "no-weighted-tokens",
                "no calibration token counts: the weight of every stream that the traces have is 0",
                remedy="raise prompt, thinking or answer under [calibration.weights]",
            )

        matrix_II = self.weights_R.new_empty(self.width, self.width, dtype=torch.float32)
        for start, stop in _slices(self.width):
            sum_CX = self._sums.pop(0)
            matrix_II[start:stop, start:] = sum_CX.div_(self._weight)
            matrix_II[stop:, start:stop] = matrix_II[start:stop, stop:].T
            del sum_CX  # before the next slice, for the sake of memory

        return Hessian(matrix_II, damping)

    def targets(self, indices: Sequence[int], hessian: Hessian) -> dict[int, torch.Tensor]:
        """Return weights that give, on the drifted input, the dense model's output.

        Minimizes Σ w |W x_dense − T x|², damped towards W: T = W + W D (H + λ)⁻¹ with
        D = Σ w (x_dense − x) xᵀ. Where the dense linear V has more inputs, W D is
        Σ w (V x_dense − W x) xᵀ. The drift is freed.
        """
        drift_XI = self._drift.div_(self._weight).float()
        del self._drift
        outputs = [len(weight_OI) for weight_OI in self.match]
        parts = torch.split(drift_XI, outputs) if self._projected else ()

        found = {}

        for index in indices:
            weight_OI = self.match[index]
            if self._projected:
                part_OI = parts[index]
            else:
                part_OI = weight_OI @ drift_XI
            found[index] = weight_OI + hessian.solve(part_OI)

        return found


def count_sums(width: int, outputs: int) -> int:
    """Return about how many sums there are for an input, and so many outputs that are matched."""
    squares = sum((stop - start) * (width - start) for start, stop in _slices(width))
    drift_rows = outputs if 2 * outputs <= width else width
    return squares + width * drift_rows


def _slices(rows: int) -> Iterator[tuple[int, int]]:
    step = max(rows // SLICES, LEAST_SLICE)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
