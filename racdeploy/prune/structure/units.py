"""What can be removed at one place of a model: the units of a structure, and which are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Units:
    """The units of a structure at one place, all of them at first."""

    def __init__(
        self,
        count: int,
        cohorts: int = 1,  # equal runs that each lose as many
        at_once: int = 1,  # that go from each run before the others are weighed again
        device: torch.device | None = None,
    ) -> None:
        self.kept_U = torch.ones(count, dtype=torch.bool, device=device)
        self._cohorts, self._at_once = cohorts, at_once

    @property
    def kept(self) -> list[int]:
        """Numbers of the units that are left, rising."""
        units: list[int] = self.kept_U.cpu().nonzero()[:, 0].tolist()
        return units

    def sizes(self) -> torch.Tensor:
        """Return how large each unit is, whatever else is left; only their order counts."""
        raise NotImplementedError

    def costs(self) -> torch.Tensor:
        """Return what the removal of each unit costs now; only their order counts."""
        raise NotImplementedError

    def exchange(self) -> None:
        """Put units back in place of others, where that costs less; not every structure can."""

    def remove(self, gone_U: torch.Tensor) -> None:
        """Remove the units of these numbers."""
        self.kept_U[gone_U] = False

    def keep(self, units: Sequence[int]) -> None:
        """Remove all but the units of these numbers."""
        self.kept_U[:] = False
        self.kept_U[torch.tensor(units)] = True

    def remove_lowest(self, weigh: Callable[[], torch.Tensor], count: int) -> None:
        """Remove those that weigh least, as many of each run, until so many are left."""
        while left := int(self.kept_U.sum()) - count:
            each = max(1, min(left // self._cohorts, self._at_once))
            weight_U = weigh().masked_fill(~self.kept_U, torch.inf)
            weight_CX = weight_U.view(self._cohorts, -1)
            lowest_CX = torch.argsort(weight_CX, dim=1, stable=True)[:, :each]
            starts_C = torch.arange(0, len(weight_U), weight_CX.shape[1], device=weight_U.device)
            self.remove((starts_C[:, None] + lowest_CX).reshape(-1))
