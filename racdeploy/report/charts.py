"""The charts of a report as inline SVG: accuracy by model, thinking by prompt, and recovery.

What is drawn where; ``charts.svg.jinja`` draws it, without script and network and in the colours of
the style sheet. Every mark carries a ``<title>``, which browsers show on hover and screen readers
read. A chart that would show nothing is empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.pairs import Pair, list_lengths
from racdeploy.report.tables import say, shorten
from racdeploy.results.answers import ArmSummary
from racdeploy.results.pruning import RecoveryRow

POINTS = 2000
"""Prompts that the chart of all prompts draws at most."""
_ORDER = ("right", "wrong", "won", "lost")  # what pruning lost comes last, on top
_FLOOR = 1e-9  # in nats: below it a mean KL is rounding
_ROW = 34  # pixels from one model to the next
_NAME_CHARACTERS = 20
_NOTHING = Markup("")
_ARM = "{0.name}: {0.accuracy:.1%} right, {0.accuracy_lower:.1%} to {0.accuracy_upper:.1%}"
_LOOK = "{0.phase}, {0.tokens:,} tokens: KL {0.kl_nats:.3g} nats, {0.accuracy:.1%} right"


def accuracy_by_arm(arms: Sequence[ArmSummary]) -> Markup:
    """Draw each model's accuracy in its interval, one row each; one alone compares nothing."""
    if len(arms) < 2:
        return _NOTHING

    bottom = 8.0 + _ROW * len(arms)
    frame = axis.Frame(146, 396, 8, bottom, height=bottom + 46)
    low = max(0.0, min(arm.accuracy_lower for arm in arms) - 0.01)
    high = max(arm.accuracy_upper for arm in arms)
    x = axis.across("accuracy", low, high, "{:.1%}".format, frame)

    rows = []
    for index, arm in enumerate(arms):
        name = shorten(arm.name, _NAME_CHARACTERS)
        height = frame.top + (index + 0.5) * _ROW
        rows.append((arm, name, height, say(_ARM, arm)))

    return axis.draw("arms", x=x, rows=rows, frame=frame)


def thinking_by_prompt(pairs: Sequence[Pair], cap: int | None) -> Markup:
    """Draw thinking tokens, pruned over dense, one point per prompt.

    Both axes are logarithmic and alike: the distance from the diagonal is the ratio, which the
    gate limits, and a few endless thoughts do not squeeze the others.
    """
    if not pairs:
        return _NOTHING

    dense, pruned = list_lengths(pairs)
    both = [max(tokens, 1) for tokens in dense + pruned]
    ticks = axis.powers(2, min(both), max(both))
    frame = axis.SQUARE
    x = axis.Axis("dense: thinking tokens", ticks, frame.left, frame.right, logarithmic=True)
    y = axis.Axis("pruned: thinking tokens", ticks, frame.bottom, frame.top, logarithmic=True)

    every = math.ceil(len(pairs) / POINTS)
    drawn = sorted(pairs[::every], key=lambda pair: _ORDER.index(pair.outcome))
    return axis.draw("lengths", x=x, y=y, pairs=drawn, cap=cap, frame=frame)


def recovery_over_tokens(rows: Sequence[RecoveryRow]) -> Markup:
    """Draw the divergence from the dense model over the tokens learned, logarithmically."""
    looks = []
    for row in rows:
        if row.kl_nats is not None and math.isfinite(row.kl_nats):
            looks.append((row, max(row.kl_nats, _FLOOR)))

    most = max((row.tokens for row, _ in looks), default=0)
    if not most:
        return _NOTHING

    values = [value for _, value in looks]
    frame = axis.FLAT
    ticks = axis.powers(10, min(values), max(values))
    x = axis.across("tokens learned", 0, most, axis.tokens_text(most))
    y = axis.Axis("KL in nats", ticks, frame.bottom, frame.top, "{:g}".format, logarithmic=True)

    marks = [(row, x(row.tokens), y(value), say(_LOOK, row)) for row, value in looks]
    return axis.draw("recovery", x=x, y=y, marks=marks, lines=_phase_lines(marks))


def _phase_lines(
    marks: Sequence[tuple[RecoveryRow, float, float, str]],
) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """Return the line of each phase, from the last look that was kept, and whether it was kept."""
    lines: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    start: list[tuple[float, float]] = []

    for row, across, up, _ in marks:
        line = lines.setdefault((row.phase, row.kept), list(start))
        line.append((across, up))
        if row.kept:
            start = [(across, up)]

    return lines
