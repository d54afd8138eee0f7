"""The units with the lowest numbers go, and the others make up for them."""

from __future__ import annotations

import torch

from racdeploy.pruning.structure.prunable_units import PrunableUnits

USES_TRACES = True


def remove_units(units: PrunableUnits, count: int) -> None:
    """Remove units until so many are left."""
    units.remove_lowest(lambda: torch.arange(len(units.kept_U)).float(), count)
