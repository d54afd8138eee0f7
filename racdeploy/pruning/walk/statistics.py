"""Calibration statistics of one input: the Hessian, and products with the dense model's input.

H = Σ x xᵀ over tokens. A batch's product is float32, the sum
float64: exact unless magnitudes are more than 2²² apart, hence the same in any order and for any
number of processes.
Source: SparseGPT (arXiv 2301.00774) section 3; GPTAQ (2504.02692).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.work_share import WorkShare

PAD = -1
# H is symmetric: of each slice of rows only the part from the diagonal on is summed. Narrower
# slices save more sums, but their products are slow.
ROW_SLICES, MIN_SLICE_ROWS = 8, 256


@dataclass
class InputStatistic:
    """Sums over the calibration tokens of one input."""

    width: int
    device: torch.device  # of the sums
    matched_weights: Sequence[Tensor] = ()  # of linears solved for the dense output
    dense_weights: Sequence[Tensor] = ()  # of the same linears before a cut of inputs
    tokens: int = field(init=False)  # after :meth:`reduce`: of all processes
    importance_I: Tensor = field(init=False)  # after :meth:`reduce`: mean squared input

    def __post_init__(self) -> None:
        I = self.width
        outputs = sum(map(len, self.matched_weights))
        # W D instead of D where that is smaller, and faster to add to.
        self._projected = bool(self.dense_weights) or 2 * outputs <= I
        rows = outputs if self._projected else I

        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self._tokens = zeros(())
        self._delta_sum = zeros(rows if self.matched_weights else 0, I)
        self._sums = [zeros(stop - start, I - start) for start, stop in _slices(I)]

    def add(self, sparse_BTI: Tensor, dense_BTI: Tensor | None, segment_BT: Tensor) -> None:
        """Add a batch's input, without padding, and the dense model's input to compare with."""
        real_BT = segment_BT.to(self.device) != PAD
        x_NI = sparse_BTI[real_BT].float()
        self._tokens += len(x_NI)

        for (start, stop), sum_CX in zip(_slices(self.width), self._sums, strict=True):
            rows_CN = x_NI[:, start:stop].T
            sum_CX += rows_CN @ x_NI[:, start:]

        if not self.matched_weights:
            return

        assert dense_BTI is not None, (
            "linears are solved for the dense output, which needs the dense input"
        )
        delta_NX = self._make_delta(dense_BTI[real_BT].float(), x_NI)

        for start, stop in _slices(delta_NX.shape[1]):
            rows_CN = delta_NX[:, start:stop].T
            self._delta_sum[start:stop] += rows_CN @ x_NI

    def _make_delta(self, dense_NI: Tensor, x_NI: Tensor) -> Tensor:
        """Return the difference to the dense input, or to the dense outputs if projected."""
        if self.dense_weights:
            sparse = [x_NI @ weight_OI.T for weight_OI in self.matched_weights]
            dense = [dense_NI @ weight_OJ.T for weight_OJ in self.dense_weights]
            return torch.cat(dense, 1) - torch.cat(sparse, 1)

        delta_NI = dense_NI - x_NI
        if not self._projected:
            return delta_NI
        return torch.cat([delta_NI @ weight_OI.T for weight_OI in self.matched_weights], 1)

    def reduce(self, share: WorkShare, linears: Sequence[str]) -> None:
        """Add up the sums over all batches; only owners of one of the linears keep the result."""
        energy_I = torch.cat([sum_CX.diagonal() for sum_CX in self._sums])
        for part in (*self._sums, self._delta_sum):
            share.add_up_for_owners(part, linears)
        for part in (energy_I, self._tokens):
            share.add_up(part)

        self.tokens = int(self._tokens)
        self.importance_I = (energy_I / self._tokens).float()

        if not share.list_owned(linears):
            self._sums.clear()
            self._delta_sum = self._delta_sum.new_empty(0, 0)

    def hessian(self, damping: float) -> Hessian:
        """Return the damped mean Hessian; the sums are freed on the way."""
        matrix_II = torch.empty(self.width, self.width, device=self.device)
        for start, stop in _slices(self.width):
            sum_CX = self._sums.pop(0)
            matrix_II[start:stop, start:] = sum_CX.div_(self._tokens)
            matrix_II[stop:, start:stop] = matrix_II[start:stop, stop:].T
            del sum_CX  # freed before the next slice is filled

        return Hessian(matrix_II, damping)

    def solve_targets(self, indices: Sequence[int], hessian: Hessian) -> dict[int, Tensor]:
        """Return weights that map the sparse model's input to the dense model's output.

        Minimizes Σ |W x_dense − T x|², damped towards W: T = W + W D (H + λ)⁻¹ with
        D = Σ (x_dense − x) xᵀ. Where the dense linear V has more inputs, W D is
        Σ (V x_dense − W x) xᵀ. The sum for D is freed.
        """
        delta_XI = self._delta_sum.div_(self._tokens).float()
        del self._delta_sum
        outputs = [len(weight_OI) for weight_OI in self.matched_weights]
        parts = torch.split(delta_XI, outputs) if self._projected else ()

        targets = {}
        for index in indices:
            weight_OI = self.matched_weights[index]
            part_OI = parts[index] if self._projected else weight_OI @ delta_XI
            targets[index] = weight_OI + hessian.solve(part_OI)

        return targets


def count_sums(width: int, outputs: int) -> int:
    """Return about how many float64 sums an :class:`InputStatistic` has.

    ``outputs``: of the linears that are solved for the dense output; 0 for none.
    """
    squares = sum((stop - start) * (width - start) for start, stop in _slices(width))
    delta_rows = outputs if 2 * outputs <= width else width
    return squares + width * delta_rows


def _slices(rows: int) -> Iterator[tuple[int, int]]:
    step = max(rows // ROW_SLICES, MIN_SLICE_ROWS)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
