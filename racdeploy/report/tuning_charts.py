"""The picture of a search for the best model: accuracy over size.

A few names stand beside their points; every point has its figures as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report.axis import Axis, draw
from racdeploy.report.tables import readable_bytes
from racdeploy.report.tuning_tables import least_accuracy
from racdeploy.results.tuning import Tuning

_TICKS = 5


def draw_accuracy(tuning: Tuning) -> Markup:
    """Draw the accuracy of all that answered over their sizes; nothing where none has."""
    shown = [each for each in tuning.candidates if each.accuracy]
    if not shown:
        return Markup("")

    sizes = [float(each.size_bytes) for each in shown]
    accuracies = [each.accuracy.value for each in shown if each.accuracy]
    return draw(
        "candidates",
        x=_scale(sizes, 60, 730),
        y=_scale(accuracies, 340, 20, high_end=1.0),
        # The winner comes last, on top.
        shown=sorted(shown, key=lambda each: each.name == tuning.winner),
        tuning=tuning,
        least=least_accuracy(tuning),
        size_text=readable_bytes,
    )


def _scale(values: Sequence[float], start: float, stop: float, high_end: float = math.inf) -> Axis:
    """Return an axis with some room around the values, within what values can be."""
    low, high = min(values), max(values)
    room = max(0.15 * (high - low), 0.03 * abs(high)) or 0.05
    low, high = max(0.0, low - room), min(high_end, high + room)
    ticks = [low + place / _TICKS * (high - low) for place in range(_TICKS + 1)]
    return Axis("", ticks, start, stop)
