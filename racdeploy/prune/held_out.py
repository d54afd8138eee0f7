"""Errors on held-out traces, by stream and by task."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from racdeploy.prune.batches import Batch
from racdeploy.prune.processes import Processes
from racdeploy.prune.statistics import PAD
from racdeploy.traces.trace import STREAMS


class RelativeError:
    """Σ |found − wanted|² / Σ |wanted|² over tokens.

    Args:
        tasks: names, in the order of ``Batch.task_B``.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._lost_KS = torch.zeros(len(self._tasks), len(STREAMS), dtype=torch.float64)
        self._energy_KS = torch.zeros_like(self._lost_KS)

    def add(self, found_BTO: torch.Tensor, wanted_BTO: torch.Tensor, batch: Batch) -> None:
        """Add a batch; padding does not count."""
        real_BT = batch.stream_BT != PAD
        place = (batch.task_B[:, None].expand_as(real_BT)[real_BT], batch.stream_BT[real_BT])
        lost_BT = (found_BTO - wanted_BTO).square().sum(-1, dtype=torch.float64)
        energy_BT = wanted_BTO.square().sum(-1, dtype=torch.float64)
        self._lost_KS.index_put_(place, lost_BT.cpu()[real_BT], accumulate=True)
        self._energy_KS.index_put_(place, energy_BT.cpu()[real_BT], accumulate=True)

    def share(self, processes: Processes) -> None:
        """Add up what the processes of a job measured."""
        processes.total(self._lost_KS)
        processes.total(self._energy_KS)

    @property
    def total(self) -> float | None:
        """Error over all tokens; None where there were none."""
        return _ratio(self._lost_KS.sum(), self._energy_KS.sum())

    @property
    def by_stream(self) -> dict[str, float]:
        """Error of each stream that had tokens."""
        return _ratios(STREAMS, self._lost_KS.sum(0), self._energy_KS.sum(0))

    @property
    def by_task(self) -> dict[str, float]:
        """Error of each task that had tokens."""
        return _ratios(self._tasks, self._lost_KS.sum(1), self._energy_KS.sum(1))


def _ratios(names: Sequence[str], lost: torch.Tensor, energy: torch.Tensor) -> dict[str, float]:
    ratios = {name: _ratio(a, b) for name, a, b in zip(names, lost, energy, strict=True)}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def _ratio(lost: torch.Tensor, energy: torch.Tensor) -> float | None:
    return float(lost / energy) if float(energy) > 0 else None
