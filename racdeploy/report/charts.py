"""Charts as inline SVG: thinking by prompt, and accuracy of models over their size or thinking.

Positions are computed here and drawn by ``charts.svg.jinja``, without script and network, in the
colours of the style sheet. Every mark carries a ``<title>``, which browsers show on hover and
screen readers read. A chart without data is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from racdeploy.report.axis import Axis, draw_chart
from racdeploy.report.pairs import AnswerPair, list_thinking_lengths
from racdeploy.results.report import BUILT_ROLES

MAX_POINTS = 2000
"""Maximum number of prompts in the scatter chart."""
LEFT, RIGHT, TOP, BOTTOM = 60, 440, 16, 396
"""Plotting area in pixels: equal scales of both axes, so that the diagonal has 45 degrees."""
_ORDER = ("right", "wrong", "won", "lost")  # lost prompts are drawn last, on top
_MAX_POWERS = 6  # intervals of a logarithmic axis
_TICKS = 5  # intervals of a linear one


def draw_thinking_by_prompt(
    pairs: Sequence[AnswerPair], cap: int | None, roles: Sequence[str] = BUILT_ROLES
) -> Markup:
    """Draw thinking tokens of the pruned model against the dense one's, one point per prompt.

    Both axes have the same logarithmic scale: the distance from the diagonal is the ratio, which
    the gate limits, and a few endless thoughts do not compress the rest.
    """
    if not pairs:
        return Markup("")

    dense, pruned = list_thinking_lengths(pairs)
    both = [max(tokens, 1) for tokens in dense + pruned]
    ticks = list_power_ticks(min(both), max(both))
    x = Axis(f"{roles[0]}: thinking tokens", ticks, LEFT, RIGHT, logarithmic=True)
    y = Axis(f"{roles[1]}: thinking tokens", ticks, BOTTOM, TOP, logarithmic=True)

    every = math.ceil(len(pairs) / MAX_POINTS)
    drawn = sorted(pairs[::every], key=lambda pair: _ORDER.index(pair.outcome))
    return draw_chart("lengths", x=x, y=y, pairs=drawn, cap=cap, roles=roles)


@dataclass(frozen=True)
class ModelPoint:
    """Accuracy of a model, with its interval, over its size or its thinking."""

    name: str
    x: float
    accuracy: float
    lower: float
    upper: float
    is_dense: bool
    is_named: bool = True
    wins: bool = False


def draw_models(
    points: Sequence[ModelPoint],
    label: str,
    x_text: Callable[[int], str],
    least: float | None = None,
    most: float | None = None,
) -> Markup:
    """Draw one point for each model, and lines at the least accuracy and at the most of the label.

    Models that win are drawn last, on top.
    """
    if not points:
        return Markup("")
    x = _scale(label, [point.x for point in points], 60, 730)
    y = _scale("", [point.accuracy for point in points], 340, 20, high_end=1.0)
    shown = sorted(points, key=lambda point: point.wins)
    return draw_chart("models", x=x, y=y, shown=shown, least=least, most=most, x_text=x_text)


def _scale(
    label: str, values: Sequence[float], start: float, stop: float, high_end: float = math.inf
) -> Axis:
    """Return an axis over the values with a margin, between 0 and ``high_end``."""
    low, high = min(values), max(values)
    margin = max(0.15 * (high - low), 0.03 * abs(high)) or 0.05
    low, high = max(0.0, low - margin), min(high_end, high + margin)
    ticks = [low + index / _TICKS * (high - low) for index in range(_TICKS + 1)]
    return Axis(label, ticks, start, stop)


def list_power_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of two that cover the range."""
    first = math.floor(math.log2(low) + 1e-9)
    last = max(math.ceil(math.log2(high) - 1e-9), first + 1)
    step = math.ceil((last - first) / _MAX_POWERS)
    return [2.0**exponent for exponent in range(first, last + step, step)]
