"""Magnitude: the smallest units go, and nothing makes up for them. The baseline."""

from __future__ import annotations

from racdeploy.prune.structure.units import Units

CALIBRATED = False


def shrink(units: Units, count: int) -> None:
    """Remove units until so many are left."""
    units.remove_lowest(units.sizes, count)
