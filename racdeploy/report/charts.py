"""Charts of a report as inline SVG: accuracy by model, thinking by prompt, and recovery.

Positions are computed here and drawn by ``charts.svg.jinja``, without script and network, in the
colours of the style sheet. Every mark carries a ``<title>``, which browsers show on hover and
screen readers read. A chart without data is empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.pairs import AnswerPair, list_thinking_lengths
from racdeploy.report.tables import format_with_units, shorten
from racdeploy.results.answers import ArmSummary
from racdeploy.results.pruning import RecoveryRow

MAX_POINTS = 2000
"""Maximum number of prompts in the scatter chart."""
_ORDER = ("right", "wrong", "won", "lost")  # lost prompts are drawn last, on top
_MIN_KL = 1e-9  # nats; a smaller mean KL is rounding
_ROW_HEIGHT = 34  # pixels
_NAME_CHARACTERS = 20
_NOTHING = Markup("")
_ARM = "{0.name}: {0.accuracy:.1%} right, {0.accuracy_lower:.1%} to {0.accuracy_upper:.1%}"
_MEASUREMENT = "{0.phase}, {0.tokens:,} tokens: KL {0.kl_nats:.3g} nats, {0.accuracy:.1%} right"


def draw_accuracy_by_model(arms: Sequence[ArmSummary]) -> Markup:
    """Draw each model's accuracy with its interval; empty for a single model."""
    if len(arms) < 2:
        return _NOTHING

    bottom = 8.0 + _ROW_HEIGHT * len(arms)
    frame = axis.Frame(146, 396, 8, bottom, height=bottom + 46)
    low = max(0.0, min(arm.accuracy_lower for arm in arms) - 0.01)
    high = max(arm.accuracy_upper for arm in arms)
    x = axis.make_horizontal_axis("accuracy", low, high, "{:.1%}".format, frame)

    rows = []
    for index, arm in enumerate(arms):
        name = shorten(arm.name, _NAME_CHARACTERS)
        height = frame.top + (index + 0.5) * _ROW_HEIGHT
        rows.append((arm, name, height, format_with_units(_ARM, arm)))

    return axis.draw_chart("arms", x=x, rows=rows, frame=frame)


def draw_thinking_by_prompt(pairs: Sequence[AnswerPair], cap: int | None) -> Markup:
    """Draw thinking tokens of the pruned model against the dense one's, one point per prompt.

    Both axes have the same logarithmic scale: the distance from the diagonal is the ratio, which
    the gate limits, and a few endless thoughts do not compress the rest.
    """
    if not pairs:
        return _NOTHING

    dense, pruned = list_thinking_lengths(pairs)
    both = [max(tokens, 1) for tokens in dense + pruned]
    ticks = axis.list_power_ticks(2, min(both), max(both))
    frame = axis.SQUARE_FRAME
    x = axis.Axis("dense: thinking tokens", ticks, frame.left, frame.right, logarithmic=True)
    y = axis.Axis("pruned: thinking tokens", ticks, frame.bottom, frame.top, logarithmic=True)

    every = math.ceil(len(pairs) / MAX_POINTS)
    drawn = sorted(pairs[::every], key=lambda pair: _ORDER.index(pair.outcome))
    return axis.draw_chart("lengths", x=x, y=y, pairs=drawn, cap=cap, frame=frame)


def draw_recovery(rows: Sequence[RecoveryRow]) -> Markup:
    """Draw the divergence from the dense model over the learned tokens, on a logarithmic scale."""
    measured = []
    for row in rows:
        if row.kl_nats is not None and math.isfinite(row.kl_nats):
            measured.append((row, max(row.kl_nats, _MIN_KL)))

    max_tokens = max((row.tokens for row, _ in measured), default=0)
    if not max_tokens:
        return _NOTHING

    values = [value for _, value in measured]
    frame = axis.FLAT_FRAME
    ticks = axis.list_power_ticks(10, min(values), max(values))
    x = axis.make_horizontal_axis(
        "tokens learned", 0, max_tokens, axis.make_token_formatter(max_tokens)
    )
    y = axis.Axis("KL in nats", ticks, frame.bottom, frame.top, "{:g}".format, logarithmic=True)

    marks = [
        (row, x(row.tokens), y(value), format_with_units(_MEASUREMENT, row))
        for row, value in measured
    ]
    return axis.draw_chart("recovery", x=x, y=y, marks=marks, lines=_phase_lines(marks))


def _phase_lines(
    marks: Sequence[tuple[RecoveryRow, float, float, str]],
) -> dict[tuple[str, bool], list[tuple[float, float]]]:
    """Return the line of each phase, by its name and whether it was kept.

    A line begins at the last kept measurement before it: an undone phase leads nowhere.
    """
    lines: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    start: list[tuple[float, float]] = []

    for row, across, up, _ in marks:
        line = lines.setdefault((row.phase, row.kept), list(start))
        line.append((across, up))
        if row.kept:
            start = [(across, up)]

    return lines
