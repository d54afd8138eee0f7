"""Relative errors on held-out traces, by segment and by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.statistics import PAD
from racdeploy.traces.trace import SEGMENTS


class RelativeError:
    """Relative error Σ |output − target|² / Σ |target|² over tokens."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks  # names, indexed by ``Batch.task_B``
        self._error_XR = torch.zeros(len(tasks), len(SEGMENTS), dtype=torch.float64)  # X: tasks
        self._energy_XR = torch.zeros_like(self._error_XR)

    def add(self, output_BTO: Tensor, target_BTO: Tensor, batch: Batch) -> None:
        """Add a batch; padding does not count."""
        real_BT = batch.segment_BT != PAD
        task_BT = batch.task_B[:, None].expand_as(real_BT)
        indices = (task_BT[real_BT], batch.segment_BT[real_BT])

        error_BTO = output_BTO - target_BTO

        for sum_XR, value_BTO in ((self._error_XR, error_BTO), (self._energy_XR, target_BTO)):
            square_BT = value_BTO.square().sum(-1, dtype=torch.float64)
            sum_XR.index_put_(indices, square_BT.cpu()[real_BT], accumulate=True)

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The sums of both squares, to be added up over all batches in place."""
        return self._error_XR, self._energy_XR

    @property
    def total(self) -> float | None:
        everything = _ratios([""], self._error_XR.sum()[None], self._energy_XR.sum()[None])
        return everything.get("")

    @property
    def by_segment(self) -> dict[str, float]:
        return _ratios(SEGMENTS, self._error_XR.sum(0), self._energy_XR.sum(0))

    @property
    def by_task(self) -> dict[str, float]:
        return _ratios(self._tasks, self._error_XR.sum(1), self._energy_XR.sum(1))


def _ratios(names: Sequence[str], error_X: Tensor, energy_X: Tensor) -> dict[str, float]:
    return {
        name: float(error / energy)
        for name, error, energy in zip(names, error_X, energy_X, strict=True)
        if energy > 0  # else no token of this kind was seen
    }


def measure_relative_change(changed_BTD: Tensor, dense_BTD: Tensor, real_BT: Tensor) -> float:
    """Return the mean over real tokens of |change|² / |dense|²; relative, since a norm follows."""
    dense_ND = dense_BTD[real_BT]
    change_N = (changed_BTD[real_BT] - dense_ND).square().sum(-1)
    energy_N = dense_ND.square().sum(-1)
    return float(torch.where(change_N > 0, change_N / energy_N, 0).mean())
