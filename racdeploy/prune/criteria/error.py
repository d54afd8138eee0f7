"""Error: that unit goes next whose removal changes the output least, given all that went before."""

from __future__ import annotations

from racdeploy.prune.structure.units import Units

CALIBRATED = True


def shrink(units: Units, count: int) -> None:
    """Remove units until so many are left."""
    units.remove_lowest(units.costs, count)
    units.exchange()
