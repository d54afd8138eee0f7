"""Charts of a search for the best model: accuracy and seconds for each right answer.

Accuracy over size and speed, seconds over size; the limits that were asked for are lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.arm_charts import bytes_text
from racdeploy.report.points import Limit, Point, draw_points
from racdeploy.report.tables import number, plain
from racdeploy.report.tuning import Candidate, Interval, Tuning
from racdeploy.report.tuning_tables import least_accuracy, share_text

_NAMED_WIDE, _NAMED = 16, 8  # names that a chart has room for
_FAR = 3.0  # what is drawn, in distances of the best from the median
_NEAR_SHARES, _NEAR_SECONDS = 0.1, 0.75  # what is drawn in any case, as shares of the best
_REACH = 1.6  # how far an interval may stretch an axis, in spans of the estimates
_NOTHING = Markup("")

_Value = Callable[[Candidate], float | None]
_Estimate = Callable[[Candidate], Interval | None]
_Found = tuple[Candidate, float, Interval]


def accuracy_over_size(tuning: Tuning) -> Markup:
    """Draw accuracy over the size of the artifact, on the full width of a page."""
    limit = _limit(tuning.wishes.max_bytes, bytes_text, "at most")
    found = _collect(tuning, _size, _accuracy)[0]
    x = _axis_of("size of the file", found, limit, bytes_text, axis.WIDE)
    return _accuracy_chart("Accuracy over size, by model", tuning, found, x, axis.WIDE, limit)


def accuracy_over_speed(tuning: Tuning) -> Markup:
    """Draw accuracy over the tokens per second that are predicted for the device."""
    limit = _limit(tuning.wishes.min_tokens_per_s, number, "at least")
    found = _collect(tuning, lambda each: each.tokens_per_s or None, _accuracy)[0]
    x = _axis_of("tokens/s, predicted for the device", found, limit, number, axis.TALL)
    return _accuracy_chart("Accuracy over speed, by model", tuning, found, x, axis.TALL, limit)


def seconds_over_size(tuning: Tuning) -> Markup:
    """Draw seconds for each right answer over the size; without those that have no right one."""
    limit = _limit(tuning.wishes.max_bytes, bytes_text, "at most")
    found = _collect(tuning, _size, _seconds)[0]
    x = _axis_of("size of the file", found, limit, bytes_text, axis.TALL)
    if x is None:
        return _NOTHING

    low, high = _range_up(found)
    least = max(0.0, low)
    y = axis.upward("seconds for each right answer", least, high, frame=axis.TALL)

    points = _points(tuning, found, y, "{:,.3g} s for each right one".format)
    label = "Seconds for each right answer over size, by model"
    return draw_points(label, points, x, y, axis.TALL, limit_across=limit)


def describe_left_out(tuning: Tuning) -> dict[str, str]:
    """Return one sentence on models that are too far off for ``accuracy`` and ``seconds``."""
    charts: dict[str, tuple[_Estimate, Callable[[float], str]]] = {
        "accuracy": (_accuracy, share_text),
        "seconds": (_seconds, "{:,.3g} s".format),
    }

    sentences = {}
    for name, (estimate, write) in charts.items():
        listed = []
        for each, _, interval in _collect(tuning, _size, estimate)[1]:
            listed.append(f"{each.name} ({write(interval.value)})")

        sentence = f"Too far off to draw: {', '.join(listed)}."
        sentences[name] = plain(sentence) if listed else ""
    return sentences


def _accuracy_chart(
    label: str,
    tuning: Tuning,
    found: Sequence[_Found],
    x: axis.Axis | None,
    frame: axis.Frame,
    limit: Limit | None,
) -> Markup:
    if x is None:
        return _NOTHING

    low, high = _range_up(found)
    least = least_accuracy(tuning)
    if least is not None and low - (high - low) / 2 < least:
        low = min(low, least)

    y = axis.upward_share("accuracy", max(0.0, low), min(1.0, high), frame)
    points = _points(tuning, found, y, lambda value: f"{share_text(value)} right", frame)
    limit_up = _limit(least, share_text, "at least")
    return draw_points(label, points, x, y, frame, limit_across=limit, limit_up=limit_up)


def _collect(tuning: Tuning, across: _Value, up: _Estimate) -> tuple[list[_Found], list[_Found]]:
    """Return the candidates that have both values, and of these those that are far off.

    A few bad models would squeeze all others into one line.
    """
    found = []
    for each in tuning.candidates:
        value = across(each)
        interval = up(each)
        if value is None or interval is None or not math.isfinite(interval.value):
            continue
        found.append((each, value, interval))

    if not found:
        return [], []

    values = [interval.value for *_, interval in found]
    middle = median(values)
    best, least_room = max(values), _NEAR_SHARES
    if up is _seconds:
        best, least_room = min(values), _NEAR_SECONDS
    room = max(_FAR * abs(best - middle), least_room * abs(best))

    near: list[_Found] = []
    far: list[_Found] = []
    for row in found:
        distance = abs(row[2].value - middle)
        (near if distance <= room else far).append(row)
    return near, far


def _axis_of(
    label: str,
    found: Sequence[_Found],
    limit: Limit | None,
    tick_text: axis.TickText,
    frame: axis.Frame,
) -> axis.Axis | None:
    """Return an axis from left to right that also has the limit, if that is not far away."""
    if not found:
        return None

    amounts = [value for _, value, _ in found]
    low = min(amounts) * 0.95
    high = max(amounts) * 1.05

    if limit and low / 1.5 <= limit.value <= high * 1.5:
        low = min(low, limit.value)
        high = max(high, limit.value)
    return axis.across(label, low, high, tick_text, frame)


def _range_up(found: Sequence[_Found]) -> tuple[float, float]:
    """Return a range with every estimate; long intervals of few prompts do not squeeze it."""
    intervals = [interval for _, _, interval in found]
    least = min(interval.value for interval in intervals)
    most = max(interval.value for interval in intervals)

    span = (most - least) or abs(least) or 1.0
    room = (_REACH - 1) * span / 2 + 0.02 * abs(most)

    low = min(interval.lower for interval in intervals)
    high = max(interval.upper for interval in intervals)
    return max(low, least - room), min(high, most + room)


def _points(
    tuning: Tuning,
    found: Sequence[_Found],
    y: axis.Axis,
    write: Callable[[float], str],
    frame: axis.Frame = axis.TALL,
) -> list[Point]:
    """Return the points, bars cut at the ends of the axis; names as far as there is room."""
    named = _choose_named(tuning, found, _NAMED_WIDE if frame is axis.WIDE else _NAMED)

    # The winner comes last, on top.
    in_order = sorted(found, key=lambda row: row[0].name == tuning.winner)

    points = []
    for each, value, interval in in_order:
        kind = "dense" if each.dense else "pruned"
        best = " best" if each.name == tuning.winner else ""
        figures = f"{write(interval.value)}, {bytes_text(each.size_bytes)}"
        speed = f", {number(each.tokens_per_s)} tokens/s" if each.tokens_per_s else ""
        point = Point(
            name=each.name,
            kind=f"{kind}{best}",
            across=value,
            up=interval.value,
            lower=max(interval.lower, y.ticks[0]),
            upper=min(interval.upper, y.ticks[-1]),
            text=f"{each.name}: {figures}{speed}",
            is_filled=each.on_front,
            is_named=each.name in named,
        )
        points.append(point)
    return points


def _choose_named(tuning: Tuning, found: Sequence[_Found], most: int) -> set[str]:
    """Return whose names there is room for: what was compared, the front, then the others."""
    chosen = (tuning.winner, tuning.rival, tuning.reference)

    def rank(each: Candidate) -> tuple[bool, bool]:
        return each.name not in chosen, not each.on_front

    in_order = sorted((each for each, *_ in found), key=rank)
    return {each.name for each in in_order[:most]}


def _limit(value: float | None, write: Callable[[float], str], side: str) -> Limit | None:
    return None if value is None else Limit(value, f"{side} {write(value)}")


def _size(each: Candidate) -> float | None:
    return float(each.size_bytes) or None


def _accuracy(each: Candidate) -> Interval | None:
    return each.accuracy


def _seconds(each: Candidate) -> Interval | None:
    return each.seconds_per_correct
