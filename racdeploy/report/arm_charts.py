"""Charts of the models that were compared: accuracy over thinking, size and speed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.labels import Box, group_marks, place_labels
from racdeploy.report.model import ArmSummary
from racdeploy.report.tables import number, readable_bytes

_BAR_PIXELS = 5.0  # between the bars of marks that coincide
_NOTHING = Markup("")

ArmValue = tuple[ArmSummary, float]
_Arrow = tuple[complex, complex, tuple[complex, ...]]
"""Both ends of the line, and the corners of the head, each x + iy in pixels."""


@dataclass(frozen=True)
class ArmMark:
    """One arm on a chart: its place as x + iy in pixels, and what is read there.

    Args:
        ring: how many marks are drawn inside it, at the same place.
        bar: where its interval is drawn, from the left.
    """

    arm: ArmSummary
    place: complex
    value: str
    ring: int = 0
    bar: float = 0.0


def accuracy_against_length(arms: Sequence[ArmSummary]) -> Markup:
    """Draw accuracy over mean thinking length, with an arrow from dense to pruned."""
    values = [(arm, arm.thinking_tokens_mean) for arm in arms]
    measured = [(arm, value) for arm, value in values if value is not None]
    label = "Accuracy against mean thinking tokens, by model"
    return _accuracy_chart(
        label, measured, "mean thinking tokens", "{:,.1f} tokens".format, frame=axis.SQUARE
    )


def accuracy_against_size(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over the size of the file; arms that are not on the front are hollow."""
    sizes = [(arm, float(arm.size_bytes)) for arm in arms if arm.size_bytes]
    label = "Accuracy against size, by model"
    return _accuracy_chart(label, sizes, "size of the file", _bytes_text, _bytes_text, front)


def accuracy_against_speed(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over decoding speed; arms that are not on the front are hollow."""
    speeds = [(arm, arm.tokens_per_s) for arm in arms if arm.tokens_per_s]
    value_text, tick_text = "{:,.0f} tokens/s".format, "{:,.0f}".format
    label = "Accuracy against speed, by model"
    return _accuracy_chart(label, speeds, "tokens/s decoded", value_text, tick_text, front)


def _accuracy_chart(
    label: str,
    values: Sequence[ArmValue],
    x_label: str,
    value_text: axis.TickText,
    tick_text: axis.TickText = number,
    front: Collection[str] | None = None,
    frame: axis.Frame = axis.FLAT,
) -> Markup:
    """Draw marks with bars and names; one mark alone compares nothing, and is not drawn."""
    if len(values) < 2:
        return _NOTHING

    arms = [arm for arm, _ in values]
    amounts = [value for _, value in values]
    low = min(arm.accuracy_lower for arm in arms) - 0.02
    high = max(arm.accuracy_upper for arm in arms) + 0.02
    x = axis.across(x_label, min(amounts) * 0.9, max(amounts) * 1.1, tick_text, frame)
    y = axis.upward_share("accuracy", max(0.0, low), min(1.0, high), frame)

    marks = []
    for arm, value in values:
        marks.append(ArmMark(arm, complex(x(value), y(arm.accuracy)), value_text(value)))
    marks = _set_apart(marks)

    by_name = {mark.arm.name: mark.place for mark in marks}
    arrow = _arrow(by_name.get("dense"), by_name.get("pruned")) if front is None else None
    names = place_labels(
        [arm.name for arm in arms],
        [mark.place for mark in marks],
        [*_bars(marks, y), *_along(arrow)],
        Box(frame.left, 0, frame.width, frame.bottom),
    )

    return axis.draw(
        "accuracy",
        label=label,
        x=x,
        y=y,
        marks=marks,
        names=names,
        arrow=arrow,
        front=front,
        frame=frame,
    )


def _set_apart(marks: Sequence[ArmMark]) -> list[ArmMark]:
    """Return the marks, those that coincide as rings around each other with bars side by side."""
    found = list(marks)

    for group in group_marks([mark.place for mark in marks]):
        for depth, index in enumerate(group):
            inner = len(group) - 1 - depth
            shift = _BAR_PIXELS * (depth - (len(group) - 1) / 2)
            found[index] = replace(marks[index], ring=inner, bar=marks[index].place.real + shift)

    return found


def _bars(marks: Sequence[ArmMark], y: axis.Axis) -> list[Box]:
    """Return what the bars of the intervals cover."""
    boxes = []
    for mark in marks:
        across, top, bottom = mark.bar, y(mark.arm.accuracy_upper), y(mark.arm.accuracy_lower)
        boxes.append(Box(across - 2, top, across + 2, bottom))
    return boxes


def _along(arrow: _Arrow | None) -> list[Box]:
    """Return small boxes along an arrow."""
    if arrow is None:
        return []

    tail, stop, _ = arrow
    steps = max(int(abs(stop - tail) / 6), 1)
    points = [tail + (stop - tail) * step / steps for step in range(steps + 1)]
    return [Box(at.real - 3, at.imag - 3, at.real + 3, at.imag + 3) for at in points]


def _arrow(start: complex | None, stop: complex | None) -> _Arrow | None:
    """Return an arrow short of both circles; without a head where there is no room."""
    if start is None or stop is None or start == stop:
        return None

    length = abs(stop - start)
    if length < 22:
        return start, stop, ()

    along = (stop - start) / length
    tip = stop - 7 * along
    base = tip - 8 * along
    half_width = 4.5j * along
    return start + 7 * along, base, (tip, base + half_width, base - half_width)


def _bytes_text(value: float) -> str:
    return readable_bytes(round(value))
