"""Error: remove the unit that changes the output least, again and again, given those removed."""

from __future__ import annotations

from racdeploy.pruning.structure.prunable_units import PrunableUnits

USES_TRACES = True


def remove_units(units: PrunableUnits, count: int) -> None:
    """Remove units until ``count`` are left."""
    units.remove_lowest(units.costs, count)
    units.exchange()
