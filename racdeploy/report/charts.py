"""Charts of the HTML report as inline SVG: no script, no network, colours from the style sheet.

Every mark carries a ``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

from markupsafe import Markup

from racdeploy.report import plot
from racdeploy.report.model import ArmSummary, LinearRow, PositionRow, Record
from racdeploy.report.tables import readable_bytes

_HEAT_LEFT = 100.0
_HEAT_ROW = 26
_BINS = 48
_POINTS = 2000
_FLOOR = 1e-9  # in nats: below it a mean KL is rounding
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Cell = tuple[str, int]
"""Kind of a linear and its block."""


def accuracy_against_length(arms: Sequence[ArmSummary]) -> Markup:
    """Draw accuracy over mean thinking length, with an arrow from dense to pruned."""
    places = [
        (arm, arm.thinking_tokens_mean) for arm in arms if arm.thinking_tokens_mean is not None
    ]
    label = "Accuracy against mean thinking tokens, by model"
    return _accuracy_chart(
        places, "mean thinking tokens", label, "{:.1f} tokens".format, "{:g}".format
    )


def accuracy_against_size(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over the size of the file; arms that are not on the front are hollow."""
    places = [(arm, float(arm.size_bytes)) for arm in arms if arm.size_bytes]
    label = "Accuracy against size, by model"
    return _accuracy_chart(places, "size of the file", label, _bytes_text, _bytes_text, front)


def accuracy_against_speed(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over decoding speed; arms that are not on the front are hollow."""
    places = [(arm, arm.tokens_per_s) for arm in arms if arm.tokens_per_s]
    label = "Accuracy against speed, by model"
    return _accuracy_chart(
        places, "tokens/s decoded", label, "{:,.0f} tokens/s".format, "{:,.0f}".format, front
    )


def paired_lengths(pairs: Sequence[tuple[Record, Record]], cap: int | None) -> Markup:
    """Draw thinking tokens, pruned over dense, one point per prompt and at most 2000 points."""
    if not pairs:
        return Markup("")

    lengths = [record.thinking_tokens for pair in pairs for record in pair]
    x, y = plot.x_scale(0, max(lengths)), plot.y_scale(0, max(lengths))
    end = min(x.ticks[-1], y.ticks[-1])
    marks = [
        plot.axes(x, y, "dense: thinking tokens", "pruned: thinking tokens"),
        plot.tag("line", "guide", x1=x(0), y1=y(0), x2=x(end), y2=y(end)),
    ]
    if cap is not None and cap <= x.ticks[-1]:
        marks.append(plot.rule_x(x, y, cap, f"cap {cap}"))

    # Those that pruning lost come last, on top.
    drawn: dict[str, list[str]] = {"same": [], "won": [], "lost": []}
    for dense, pruned in pairs[:: math.ceil(len(pairs) / _POINTS)]:
        across, up = dense.thinking_tokens, pruned.thinking_tokens
        outcome = _outcome(dense, pruned)
        found = plot.title(f"prompt {dense.prompt}: {across} dense, {up} pruned")
        drawn[outcome].append(plot.tag("circle", outcome, found, cx=x(across), cy=y(up), r="3.5"))

    marks += [mark for group in drawn.values() for mark in group]
    return plot.svg(marks, "Thinking tokens of the pruned model against the dense one, by prompt")


def length_histogram(dense: Sequence[int], pruned: Sequence[int], cap: int | None) -> Markup:
    """Draw how often each thinking length occurs, both arms side by side, with the cap."""
    if not dense and not pruned:
        return Markup("")

    x = plot.x_scale(0, max([*dense, *pruned, cap or 0, 1]))
    bin_tokens = x.ticks[-1] / _BINS
    counts = {"dense": _count(dense, bin_tokens), "pruned": _count(pruned, bin_tokens)}
    y = plot.y_scale(0, max(1, *counts["dense"], *counts["pruned"]))
    marks = [plot.axes(x, y, "thinking tokens", "prompts")]

    # Two bars share a bin, half a pixel apart.
    width = (x(bin_tokens) - x(0)) / 2 - 0.5
    for offset, name in ((0.25, "dense"), (width + 0.75, "pruned")):
        for place, count in enumerate(counts[name]):
            if not count:
                continue
            low, high = place * bin_tokens, (place + 1) * bin_tokens
            found = plot.title(f"{name}: {count} from {low:.0f} to {high:.0f} tokens")
            left, top = x(low) + offset, y(count)
            marks.append(
                plot.tag("rect", name, found, x=left, y=top, width=width, height=y(0) - top)
            )

    if cap is not None:
        marks.append(plot.rule_x(x, y, cap, f"cap {cap}"))
    return plot.svg(marks, "Histogram of thinking tokens, dense and pruned")


def divergence_along(rows: Sequence[PositionRow]) -> Markup:
    """Draw both divergences over the distance from the end of the prompt, logarithmically."""
    if not rows:
        return Markup("")

    series = {
        "pruning": [max(row.pruning_kl_nats, _FLOOR) for row in rows],
        "export": [max(row.export_kl_nats, _FLOOR) for row in rows],
    }
    every = series["pruning"] + series["export"]
    x, y = plot.x_scale(0, rows[-1].stop_token), _decades(min(every), max(every))
    marks = [plot.axes(x, y, "completion tokens after the prompt", "KL in nats", _power_text)]

    for name, values in series.items():
        points, dots = [], []
        for row, value in zip(rows, values, strict=True):
            across, up = x((row.start_token + row.stop_token) / 2), y(math.log10(value))
            stretch = f"tokens {row.start_token} to {row.stop_token}, {row.tokens} positions"
            found = plot.title(f"{name}: {value:.2g} nats, {stretch}")
            points.append(f"{across:.1f},{up:.1f}")
            dots.append(plot.tag("circle", f"dot {name}", found, cx=across, cy=up, r="2.5"))
        marks += [plot.tag("polyline", f"line {name}", points=" ".join(points)), *dots]

    return plot.svg(marks, "Divergence along the completion, of the export and of pruning")


def heat_map(
    linears: Iterable[LinearRow], value: Callable[[LinearRow], float | None], label: str
) -> Markup:
    """Draw one number per linear: blocks across, kinds down; numbers of one cell are averaged."""
    means = _average_cells(linears, value)
    if not means:
        return Markup("")

    kinds = list(dict.fromkeys(kind for kind, _ in means))
    blocks = sorted({block for _, block in means})
    low, high = min(means.values()), max(means.values())
    side = min(40.0, max(7.0, (plot.WIDTH - _HEAT_LEFT - 4) / len(blocks)))
    marks = [
        plot.text(_HEAT_LEFT - 8, row * _HEAT_ROW + 17, kind, anchor="end")
        for row, kind in enumerate(kinds)
    ]

    for (kind, block), number in means.items():
        share = (number - low) / (high - low) if high > low else 0.5
        found = plot.title(f"block {block}, {kind}: {number:.4g}")
        left, top = _HEAT_LEFT + blocks.index(block) * side, kinds.index(kind) * _HEAT_ROW
        marks.append(_heat_mark(left, str(top), f"{side - 1.5:.1f}", "24.5", share, found))

    # A number of two digits takes about 24 pixels.
    bottom = len(kinds) * _HEAT_ROW + 14
    for column in range(0, len(blocks), max(1, math.ceil(24 / side))):
        marks.append(plot.text(_HEAT_LEFT + (column + 0.5) * side, bottom, str(blocks[column])))

    marks.append(_heat_key(bottom + 14, low, high))
    width = max(_HEAT_LEFT + len(blocks) * side, plot.WIDTH)
    return plot.svg(marks, label, width, bottom + 34)


def _accuracy_chart(
    places: Sequence[tuple[ArmSummary, float]],
    x_label: str,
    label: str,
    value_text: Callable[[float], str],
    tick_text: Callable[[float], str],
    front: Collection[str] | None = None,
) -> Markup:
    if not places:
        return Markup("")

    values = [value for _, value in places]
    low = min(arm.accuracy_lower for arm, _ in places)
    high = max(arm.accuracy_upper for arm, _ in places)
    x = plot.x_scale(min(values) * 0.9, max(values) * 1.1)
    y = plot.y_scale(max(0.0, low - 0.02), min(1.0, high + 0.02))
    marks = [plot.axes(x, y, x_label, "accuracy", _percent(y), tick_text)]

    at = {arm.name: (x(value), y(arm.accuracy)) for arm, value in places}
    if front is None and "dense" in at and "pruned" in at and at["dense"] != at["pruned"]:
        marks.append(_arrow(*at["dense"], *at["pruned"]))

    heights = _label_heights([at[arm.name] for arm, _ in places])
    for (arm, value), height in zip(places, heights, strict=True):
        hollow = front is not None and arm.name not in front
        found = f"{arm.name}: {arm.accuracy:.1%}, {value_text(value)}"
        marks.append(_arm_mark(arm, x(value), y, height, plot.title(found), hollow))
    return plot.svg(marks, label)


def _label_heights(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return a height for each name so that names of neighbouring marks do not overlap."""
    heights = [0.0] * len(places)
    taken: list[tuple[float, float]] = []

    for index, (across, up) in sorted(enumerate(places), key=lambda item: item[1][1]):
        height = up - 9
        near = [used for other, used in taken if abs(across - other) < 130]
        while any(abs(height - used) < 15 for used in near):
            height += 3
        heights[index] = height
        taken.append((across, height))
    return heights


def _arm_mark(
    arm: ArmSummary, across: float, y: plot.Scale, label_height: float, found: str, hollow: bool
) -> str:
    low, middle, high = y(arm.accuracy_lower), y(arm.accuracy), y(arm.accuracy_upper)
    kind = arm.name if arm.name in ("dense", "pruned") else "rival"
    side, anchor = (-11, "end") if across > plot.WIDTH * 0.6 else (11, "start")
    marks = [
        found,
        plot.tag("line", x1=across, x2=across, y1=low, y2=high),
        plot.tag("circle", cx=across, cy=middle, r=6),
        plot.text(across + side, label_height, arm.name, "name", anchor),
    ]
    return plot.tag("g", f"arm {kind} off" if hollow else f"arm {kind}", "".join(marks))


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw an arrow that ends short of both circles; without a head where there is no room."""
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 22:
        return plot.tag("g", "arrow", plot.tag("line", x1=x1, y1=y1, x2=x2, y2=y2))

    across, down = (x2 - x1) / length, (y2 - y1) / length
    tip_x, tip_y = x2 - 7 * across, y2 - 7 * down
    base_x, base_y = tip_x - 8 * across, tip_y - 8 * down
    corners = (
        (tip_x, tip_y),
        (base_x - 4.5 * down, base_y + 4.5 * across),
        (base_x + 4.5 * down, base_y - 4.5 * across),
    )

    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    line = plot.tag("line", x1=x1 + 7 * across, y1=y1 + 7 * down, x2=base_x, y2=base_y)
    return plot.tag("g", "arrow", line + plot.tag("polygon", points=points))


def _heat_mark(
    left: float, top: str, width: str, height: str, share: float, found: str = ""
) -> str:
    """Draw a cell; the smallest number keeps a shade, so that it differs from an empty place."""
    size = {"width": width, "height": height} | ({"rx": "2"} if found else {})
    shade = f"{0.12 + 0.88 * share:.2f}"
    return plot.tag("rect", "heat", found, x=left, y=top, **size, fill_opacity=shade)


def _heat_key(top: float, low: float, high: float) -> str:
    """Draw the shades from least to most with the numbers they represent."""
    if high == low:
        return plot.text(_HEAT_LEFT, top + 12, f"all are {low:.3g}", "label", "start")

    left = _HEAT_LEFT + 52
    least = plot.text(left - 6, top + 12, f"{low:.3g}", "label", "end")
    most = plot.text(left + 96 + 6, top + 12, f"{high:.3g}, by block", "label", "start")
    swatches = [
        _heat_mark(left + 12 * step, f"{top + 3:.0f}", "12", "10", step / 7) for step in range(8)
    ]
    return "".join([least, *swatches, most])


def _average_cells(
    linears: Iterable[LinearRow], value: Callable[[LinearRow], float | None]
) -> dict[Cell, float]:
    cells: dict[Cell, list[float]] = defaultdict(list)
    for row in linears:
        number = value(row)
        if number is not None and math.isfinite(number):
            cells[_cell(row.name)].append(number)
    return {cell: sum(numbers) / len(numbers) for cell, numbers in cells.items()}


def _cell(name: str) -> Cell:
    """Split a linear's name into its kind and its block, experts and the like folded into ``*``."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    if match is None:
        return name, 0
    kind = re.sub(r"\.\d+\.", ".*.", match.group(2))
    return kind.removeprefix("self_attn.").removeprefix("mlp."), int(match.group(1))


def _count(lengths: Iterable[int], bin_tokens: float) -> list[int]:
    counts = [0] * _BINS
    for length in lengths:
        counts[min(int(length / bin_tokens), _BINS - 1)] += 1
    return counts


def _outcome(dense: Record, pruned: Record) -> str:
    if dense.correct == pruned.correct:
        return "same"
    return "lost" if dense.correct else "won"


def _decades(low: float, high: float) -> plot.Scale:
    """Return an upward scale over whole powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 6))
    ticks = range(first, max(last, first + 1) + step, step)
    whole = plot.y_scale(0, 1)
    return plot.Scale(tuple(ticks), whole.start, whole.stop)


def _power_text(exponent: float) -> str:
    return f"10{f'{exponent:.0f}'.translate(_SUPERSCRIPTS)}"


def _percent(scale: plot.Scale) -> Callable[[float], str]:
    """Return percentages with as many digits as tell the ticks apart."""
    digits = 0 if scale.ticks[1] - scale.ticks[0] >= 0.0099 else 1
    return lambda value: f"{value:.{digits}%}"


def _bytes_text(value: float) -> str:
    return readable_bytes(round(value))
