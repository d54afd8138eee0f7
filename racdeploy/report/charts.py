"""Charts of the HTML report as inline SVG: no script, no network, colours from the page's style sheet.

Every mark carries a ``<title>``, which browsers show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from racdeploy.report import plot
from racdeploy.report.model import ArmSummary, LinearRow, PositionRow
from racdeploy.report.tables import readable_bytes

_HEAT_LEFT = 100.0
_BINS = 48
_POINTS = 2000
_FLOOR = 1e-9  # in nats: below it a mean KL is rounding
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class LengthPair:
    """Thinking tokens of both arms on one prompt; ``outcome`` is ``same``, ``lost`` or ``won`` by pruning."""

    prompt: int
    dense: int
    pruned: int
    outcome: str


def accuracy_against_length(arms: Sequence[ArmSummary]) -> Markup:
    """Draw each arm's accuracy over its mean thinking length, with an arrow from dense to pruned."""
    places = [
        (arm, arm.thinking_tokens_mean) for arm in arms if arm.thinking_tokens_mean is not None
    ]
    label = "Accuracy against mean thinking tokens, by model"
    return _accuracy_chart(
        places, "mean thinking tokens", label, "{:.1f} tokens".format, "{:g}".format
    )


def accuracy_against_size(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw each arm's accuracy over the size of its file; arms that are not on the front are hollow."""
    places = [(arm, float(arm.size_bytes)) for arm in arms if arm.size_bytes]
    label = "Accuracy against size, by model"
    return _accuracy_chart(places, "size of the file", label, _bytes_text, _bytes_text, front)


def accuracy_against_speed(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw each arm's accuracy over its decoding speed; arms that are not on the front are hollow."""
    places = [(arm, arm.tokens_per_s) for arm in arms if arm.tokens_per_s]
    label = "Accuracy against speed, by model"
    return _accuracy_chart(
        places, "tokens/s decoded", label, "{:,.0f} tokens/s".format, "{:,.0f}".format, front
    )


def paired_lengths(pairs: Sequence[LengthPair], cap: int | None) -> Markup:
    """Draw the thinking tokens of both arms, one point per prompt; above the diagonal pruning thinks longer.

    Draws every k-th point where there are more than 2000.
    """
    if not pairs:
        return Markup("")
    step = -(-len(pairs) // _POINTS)
    longest = max(max(pair.dense, pair.pruned) for pair in pairs)
    x, y = plot.x_scale(0, longest), plot.y_scale(0, longest)
    end = min(x.ticks[-1], y.ticks[-1])
    marks = [
        plot.axes(x, y, "dense: thinking tokens", "pruned: thinking tokens"),
        f'<line class="guide" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(end):.1f}" y2="{y(end):.1f}"/>',
    ]
    if cap is not None and cap <= x.ticks[-1]:
        marks.append(plot.rule_x(x, y, cap, f"cap {cap}"))
    # Those that pruning lost come last, on top.
    for pair in sorted(pairs[::step], key=lambda pair: ("same", "won", "lost").index(pair.outcome)):
        marks.append(
            f'<circle class="{pair.outcome}" cx="{x(pair.dense):.1f}" cy="{y(pair.pruned):.1f}" r="3.5">'
            f"<title>prompt {pair.prompt}: {pair.dense} dense, {pair.pruned} pruned</title></circle>"
        )
    return plot.svg(marks, "Thinking tokens of the pruned model against the dense one, by prompt")


def length_histogram(dense: Sequence[int], pruned: Sequence[int], cap: int | None) -> Markup:
    """Draw how often each thinking length occurs, both arms side by side, with the cap."""
    if not dense and not pruned:
        return Markup("")
    x = plot.x_scale(0, max([*dense, *pruned, cap or 0, 1]))
    width = x.ticks[-1] / _BINS
    counts = [[0] * _BINS for _ in range(2)]
    for arm, lengths in enumerate((dense, pruned)):
        for length in lengths:
            counts[arm][min(int(length / width), _BINS - 1)] += 1
    y = plot.y_scale(0, max(max(counts[0]), max(counts[1]), 1))
    marks = [plot.axes(x, y, "thinking tokens", "prompts")]
    pixels = (x(width) - x(0)) / 2 - 0.5
    for arm, name in enumerate(("dense", "pruned")):
        for place, count in enumerate(counts[arm]):
            if count:
                left = x(place * width) + arm * (pixels + 0.5) + 0.25
                marks.append(
                    f'<rect class="{name}" x="{left:.1f}" y="{y(count):.1f}" width="{pixels:.1f}" '
                    f'height="{y(0) - y(count):.1f}"><title>{name}: {count} from {place * width:.0f} to '
                    f"{(place + 1) * width:.0f} tokens</title></rect>"
                )
    if cap is not None:
        marks.append(plot.rule_x(x, y, cap, f"cap {cap}"))
    return plot.svg(marks, "Histogram of thinking tokens, dense and pruned")


def divergence_along(rows: Sequence[PositionRow]) -> Markup:
    """Draw both divergences over the distance from the end of the prompt, on a logarithmic scale."""
    if not rows:
        return Markup("")
    series = {
        "pruning": [max(row.pruning_kl_nats, _FLOOR) for row in rows],
        "export": [max(row.export_kl_nats, _FLOOR) for row in rows],
    }
    x = plot.x_scale(0, rows[-1].stop_token)
    y = _decades(min(map(min, series.values())), max(map(max, series.values())))
    marks = [plot.axes(x, y, "completion tokens after the prompt", "KL in nats", _power_text)]
    for name, values in series.items():
        places = [
            (x((row.start_token + row.stop_token) / 2), y(math.log10(value)), value, row)
            for row, value in zip(rows, values, strict=True)
        ]
        line = " ".join(f"{across:.1f},{up:.1f}" for across, up, _, _ in places)
        marks.append(f'<polyline class="line {name}" points="{line}"/>')
        marks += [
            f'<circle class="dot {name}" cx="{across:.1f}" cy="{up:.1f}" r="2.5">'
            f"<title>{name}: {value:.2g} nats, tokens {row.start_token} to {row.stop_token}, {row.tokens} positions"
            "</title></circle>"
            for across, up, value, row in places
        ]
    return plot.svg(marks, "Divergence along the completion, of the export and of pruning")


def heat_map(
    linears: Iterable[LinearRow], value: Callable[[LinearRow], float | None], label: str
) -> Markup:
    """Draw one number per linear: blocks across, kinds of linear down; numbers of one cell are averaged."""
    cells: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in linears:
        number = value(row)
        if number is not None and math.isfinite(number):
            cells[_place(row.name)].append(number)
    if not cells:
        return Markup("")
    means = {place: sum(numbers) / len(numbers) for place, numbers in cells.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in means))
    blocks = sorted({block for _, block in means})
    low, high = min(means.values()), max(means.values())
    side = min(40.0, max(7.0, (plot.WIDTH - _HEAT_LEFT - 4) / len(blocks)))
    marks = [
        plot.text(_HEAT_LEFT - 8, row * 26 + 17, kind, anchor="end")
        for row, kind in enumerate(kinds)
    ]
    for (kind, block), number in means.items():
        shade = 0.12 + 0.88 * ((number - low) / (high - low) if high > low else 0.5)
        marks.append(
            f'<rect class="heat" x="{_HEAT_LEFT + blocks.index(block) * side:.1f}" '
            f'y="{kinds.index(kind) * 26}" width="{side - 1.5:.1f}" height="24.5" rx="2" '
            f'fill-opacity="{shade:.2f}">{plot.title(f"block {block}, {kind}: {number:.4g}")}</rect>'
        )
    bottom = len(kinds) * 26 + 14
    for column in range(0, len(blocks), max(1, math.ceil(24 / side))):
        marks.append(plot.text(_HEAT_LEFT + (column + 0.5) * side, bottom, str(blocks[column])))
    marks.append(_heat_key(bottom + 14, low, high))
    return plot.svg(marks, label, max(_HEAT_LEFT + len(blocks) * side, plot.WIDTH), bottom + 34)


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
    x = plot.x_scale(min(values) * 0.9, max(values) * 1.1)
    low, high = (
        min(arm.accuracy_lower for arm, _ in places),
        max(arm.accuracy_upper for arm, _ in places),
    )
    y = plot.y_scale(max(0.0, low - 0.02), min(1.0, high + 0.02))
    marks = [plot.axes(x, y, x_label, "accuracy", _percent(y), tick_text)]
    at = {arm.name: (x(value), y(arm.accuracy)) for arm, value in places}
    if front is None and "dense" in at and "pruned" in at and at["dense"] != at["pruned"]:
        marks.append(_arrow(*at["dense"], *at["pruned"]))
    heights = _label_heights([at[arm.name] for arm, _ in places])
    for (arm, value), height in zip(places, heights, strict=True):
        hollow = " off" if front is not None and arm.name not in front else ""
        marks.append(
            _arm_mark(arm, x(value), y, height, f"{arm.accuracy:.1%}, {value_text(value)}", hollow)
        )
    return plot.svg(marks, label)


def _label_heights(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return a height for each name so that names of neighbouring marks do not cover one another."""
    heights = [0.0] * len(places)
    taken: list[tuple[float, float]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index][1]):
        across, height = places[index][0], places[index][1] - 9
        while any(abs(across - other) < 130 and abs(height - used) < 15 for other, used in taken):
            height += 3
        heights[index] = height
        taken.append((across, height))
    return heights


def _arm_mark(
    arm: ArmSummary, across: float, y: plot.Scale, label_height: float, found: str, hollow: str
) -> str:
    side, anchor = (-11, "end") if across > plot.WIDTH * 0.6 else (11, "start")
    kind = arm.name if arm.name in ("dense", "pruned") else "rival"
    return (
        f'<g class="arm {kind}{hollow}">{plot.title(f"{arm.name}: {found}")}'
        f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{y(arm.accuracy_lower):.1f}" '
        f'y2="{y(arm.accuracy_upper):.1f}"/><circle cx="{across:.1f}" cy="{y(arm.accuracy):.1f}" r="6"/>'
        f"{plot.text(across + side, label_height, arm.name, 'name', anchor)}</g>"
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw a line with a head that ends short of both circles; without a head where they leave no room for one."""
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 22:
        return (
            f'<g class="arrow"><line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/></g>'
        )
    across, down = (x2 - x1) / length, (y2 - y1) / length
    tip_x, tip_y = x2 - 7 * across, y2 - 7 * down
    base_x, base_y = tip_x - 8 * across, tip_y - 8 * down
    points = " ".join(
        f"{px:.1f},{py:.1f}"
        for px, py in (
            (tip_x, tip_y),
            (base_x - 4.5 * down, base_y + 4.5 * across),
            (base_x + 4.5 * down, base_y - 4.5 * across),
        )
    )
    return (
        f'<g class="arrow"><line x1="{x1 + 7 * across:.1f}" y1="{y1 + 7 * down:.1f}" x2="{base_x:.1f}" '
        f'y2="{base_y:.1f}"/><polygon points="{points}"/></g>'
    )


def _heat_key(top: float, low: float, high: float) -> str:
    """Draw the shades from least to most with the numbers they stand for."""
    if high == low:
        return plot.text(_HEAT_LEFT, top + 12, f"all are {low:.3g}", "label", "start")
    swatches = [
        f'<rect class="heat" x="{_HEAT_LEFT + 52 + 12 * step}" y="{top + 3:.0f}" width="12" height="10" '
        f'fill-opacity="{0.12 + 0.88 * step / 7:.2f}"/>'
        for step in range(8)
    ]
    least = plot.text(_HEAT_LEFT + 46, top + 12, f"{low:.3g}", "label", "end")
    most = plot.text(_HEAT_LEFT + 52 + 96 + 6, top + 12, f"{high:.3g}, by block", "label", "start")
    return "".join([least, *swatches, most])


def _decades(low: float, high: float) -> plot.Scale:
    """Return an upward scale over whole powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, -(-(last - first) // 6))
    whole = plot.y_scale(0, 1)
    return plot.Scale(
        tuple(range(first, max(last, first + 1) + step, step)), whole.start, whole.stop
    )


def _power_text(exponent: float) -> str:
    return f"10{f'{exponent:.0f}'.translate(_SUPERSCRIPTS)}"


def _percent(scale: plot.Scale) -> Callable[[float], str]:
    """Return percentages with as many digits as tell the ticks apart."""
    digits = 0 if scale.ticks[1] - scale.ticks[0] >= 0.0099 else 1
    return lambda value: f"{value:.{digits}%}"


def _bytes_text(value: float) -> str:
    return readable_bytes(round(value))


def _place(name: str) -> tuple[str, int]:
    """Split a linear's name into its kind and its block, experts and the like folded into ``*``."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    if match is None:
        return name, 0
    kind = re.sub(r"\.\d+\.", ".*.", match.group(2))
    return kind.removeprefix("self_attn.").removeprefix("mlp."), int(match.group(1))
