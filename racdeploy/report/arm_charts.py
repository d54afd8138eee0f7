"""Charts of the models that were compared: accuracy over thinking, size and speed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.model import ArmSummary
from racdeploy.report.points import Point, draw_points
from racdeploy.report.tables import number, readable_bytes

_NOTHING = Markup("")
_KINDS = ("dense", "pruned")

ArmValue = tuple[ArmSummary, float]


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
    return _accuracy_chart(label, sizes, "size of the file", bytes_text, bytes_text, front)


def accuracy_against_speed(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over decoding speed; arms that are not on the front are hollow."""
    speeds = [(arm, arm.tokens_per_s) for arm in arms if arm.tokens_per_s]
    value_text, tick_text = "{:,.0f} tokens/s".format, "{:,.0f}".format
    label = "Accuracy against speed, by model"
    return _accuracy_chart(label, speeds, "tokens/s decoded", value_text, tick_text, front)


def bytes_text(value: float) -> str:
    """Return a size as the ticks of an axis have it."""
    return readable_bytes(round(value))


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

    amounts = [value for _, value in values]
    low = min(arm.accuracy_lower for arm, _ in values) - 0.02
    high = max(arm.accuracy_upper for arm, _ in values) + 0.02
    x = axis.across(x_label, min(amounts) * 0.9, max(amounts) * 1.1, tick_text, frame)
    y = axis.upward_share("accuracy", max(0.0, low), min(1.0, high), frame)

    points = []
    for arm, value in values:
        point = Point(
            name=arm.name,
            kind=arm.name if arm.name in _KINDS else "rival",
            across=value,
            up=arm.accuracy,
            lower=arm.accuracy_lower,
            upper=arm.accuracy_upper,
            text=f"{arm.name}: {arm.accuracy:.1%}, {value_text(value)}",
            is_filled=front is None or arm.name in front,
        )
        points.append(point)

    arrow = _KINDS if front is None else None
    return draw_points(label, points, x, y, frame, arrow=arrow)
