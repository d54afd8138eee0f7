"""Errors on held-out traces, by stream and by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from racdeploy.prune.processes import Processes
from racdeploy.prune.walk.batches import Batch
from racdeploy.prune.walk.statistics import PAD
from racdeploy.traces.trace import STREAMS


class RelativeError:
    """Σ |found − wanted|² / Σ |wanted|² over tokens, where there were any."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tasks  # names, in the order of ``Batch.task_B``
        self._lost_XR = torch.zeros(len(tasks), len(STREAMS), dtype=torch.float64)  # X: tasks
        self._energy_XR = torch.zeros_like(self._lost_XR)

    def add(self, found_BTO: torch.Tensor, wanted_BTO: torch.Tensor, batch: Batch) -> None:
        """Add a batch; padding does not count."""
        real_BT = batch.stream_BT != PAD
        task_BT = batch.task_B[:, None].expand_as(real_BT)
        place = (task_BT[real_BT], batch.stream_BT[real_BT])

        lost_BTO = found_BTO - wanted_BTO

        for sum_XR, value_BTO in ((self._lost_XR, lost_BTO), (self._energy_XR, wanted_BTO)):
            square_BT = value_BTO.square().sum(-1, dtype=torch.float64)
            sum_XR.index_put_(place, square_BT.cpu()[real_BT], accumulate=True)

    def share(self, processes: Processes) -> None:
        processes.total(self._lost_XR)
        processes.total(self._energy_XR)

    @property
    def total(self) -> float | None:
        everything = _ratios([""], self._lost_XR.sum()[None], self._energy_XR.sum()[None])
        return everything.get("")

    @property
    def by_stream(self) -> dict[str, float]:
        return _ratios(STREAMS, self._lost_XR.sum(0), self._energy_XR.sum(0))

    @property
    def by_task(self) -> dict[str, float]:
        return _ratios(self._tasks, self._lost_XR.sum(1), self._energy_XR.sum(1))


def _ratios(names: Sequence[str], lost_X: torch.Tensor, energy_X: torch.Tensor) -> dict[str, float]:
    ratios = {}
    for name, lost, energy in zip(names, lost_X, energy_X, strict=True):
        if energy > 0:
            ratios[name] = float(lost / energy)
    return ratios
