"""Units of a structure that a criterion removes, and those that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class PrunableUnits:
    """Units of a structure in one block or model; all are kept at first."""

    def __init__(
        self,
        count: int,
        cohorts: int = 1,  # equal runs of units that each lose the same number
        units_per_round: int = 1,  # removed from each run before costs are computed again
        device: torch.device | None = None,
    ) -> None:
        self.kept_U = torch.ones(count, dtype=torch.bool, device=device)
        self._cohorts, self._units_per_round = cohorts, units_per_round

    @property
    def kept(self) -> list[int]:
        """Indices of the units that are left, ascending."""
        units: list[int] = self.kept_U.cpu().nonzero()[:, 0].tolist()
        return units

    def sizes(self) -> Tensor:
        """Return the size of each unit, independent of the others; only the order counts."""
        raise NotImplementedError

    def costs(self) -> Tensor:
        """Return the cost of removing each unit now; only the order counts."""
        raise NotImplementedError

    def exchange(self) -> None:
        """Swap removed units for kept ones where that costs less; a structure need not do so."""

    def remove(self, removed_U: Tensor) -> None:
        """Remove the units of these indices."""
        self.kept_U[removed_U] = False

    def keep(self, units: Sequence[int]) -> None:
        """Keep the units of these indices and remove all others."""
        self.kept_U[:] = False
        self.kept_U[torch.tensor(units)] = True

    def remove_lowest(self, weigh: Callable[[], Tensor], count: int) -> None:
        """Remove the units of lowest weight, equally from each run, until ``count`` are left."""
        while surplus := int(self.kept_U.sum()) - count:
            per_run = max(1, min(surplus // self._cohorts, self._units_per_round))
            weight_U = weigh().masked_fill(~self.kept_U, torch.inf)
            weight_CX = weight_U.view(self._cohorts, -1)
            lowest_CX = torch.argsort(weight_CX, dim=1, stable=True)[:, :per_run]

            run_length = weight_CX.shape[1]
            starts_C = torch.arange(0, len(weight_U), run_length, device=weight_U.device)
            index_CX = starts_C[:, None] + lowest_CX
            self.remove(index_CX.reshape(-1))
