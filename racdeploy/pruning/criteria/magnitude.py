"""Magnitude: remove the smallest units, without compensation. The baseline."""

from __future__ import annotations

from racdeploy.pruning.structure.prunable_units import PrunableUnits

USES_TRACES = False


def remove_units(units: PrunableUnits, count: int) -> None:
    """Remove units until ``count`` are left."""
    units.remove_lowest(units.sizes, count)
