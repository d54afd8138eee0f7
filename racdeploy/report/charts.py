"""Chart of a report as inline SVG: thinking by prompt.

Positions are computed here and drawn by ``charts.svg.jinja``, without script and network, in the
colours of the style sheet. Every mark carries a ``<title>``, which browsers show on hover and
screen readers read. A chart without data is empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report.axis import Axis, draw_chart
from racdeploy.report.pairs import AnswerPair, list_thinking_lengths
from racdeploy.results.report import BUILT_ROLES

MAX_POINTS = 2000
"""Maximum number of prompts in the scatter chart."""
LEFT, RIGHT, TOP, BOTTOM = 60, 440, 16, 396
"""Plotting area in pixels: equal scales of both axes, so that the diagonal has 45 degrees."""
_ORDER = ("right", "wrong", "won", "lost")  # lost prompts are drawn last, on top
_MAX_POWERS = 6  # intervals of an axis


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


def list_power_ticks(low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of two that cover the range."""
    first = math.floor(math.log2(low) + 1e-9)
    last = max(math.ceil(math.log2(high) - 1e-9), first + 1)
    step = math.ceil((last - first) / _MAX_POWERS)
    return [2.0**exponent for exponent in range(first, last + step, step)]
