"""Charts of the HTML report as inline SVG: no script, no network, colours from the page's style sheet.

Every mark carries a ``<title>``, which browsers show on hover and screen readers read. Text from outside
(names of arms and linears) is escaped here, because the template takes a chart as finished markup.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from racdeploy.report.tables import plain
from racdeploy.report_model import ArmSummary, LinearRow

__all__ = ["LengthPair", "accuracy_against_length", "heat_map", "length_histogram", "paired_lengths"]

_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 18.0, 14.0, 44.0
_HEAT_LEFT = 130.0
_BINS = 24
_POINTS = 2000


@dataclass(frozen=True)
class LengthPair:
    """Thinking tokens of both arms on one prompt; ``outcome`` is ``same``, ``lost`` or ``won`` by pruning."""

    prompt: int
    dense: int
    pruned: int
    outcome: str


@dataclass(frozen=True)
class _Scale:
    """Data to pixels along one axis, over round ticks."""

    ticks: tuple[float, ...]
    start: float
    stop: float

    @classmethod
    def over(cls, low: float, high: float, start: float, stop: float) -> _Scale:
        span = (high - low) or abs(high) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(span / 5))
        step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= 6)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(tuple(i * step for i in range(first, max(last, first + 1) + 1)), start, stop)

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.start + share * (self.stop - self.start)


def accuracy_against_length(arms: Sequence[ArmSummary]) -> Markup:
    """Draw each arm's accuracy over its mean thinking length, with an arrow from dense to pruned."""
    drawn = [(arm, arm.thinking_tokens_mean) for arm in arms if arm.thinking_tokens_mean is not None]
    if not drawn:
        return Markup("")
    lengths = [length for _, length in drawn]
    x = _x_scale(min(lengths) * 0.9, max(lengths) * 1.1)
    low, high = min(arm.accuracy_lower for arm, _ in drawn), max(arm.accuracy_upper for arm, _ in drawn)
    y = _y_scale(max(0.0, low - 0.02), min(1.0, high + 0.02))
    marks = [_axes(x, y, "mean thinking tokens", "accuracy", lambda v: f"{v:.0%}")]
    at = {arm.name: (x(length), y(arm.accuracy)) for arm, length in drawn}
    if "dense" in at and "pruned" in at and at["dense"] != at["pruned"]:
        marks.append(_arrow(*at["dense"], *at["pruned"]))
    marks += [_arm_mark(arm, length, x, y) for arm, length in drawn]
    return _svg(marks, "Accuracy against mean thinking tokens, by model")


def paired_lengths(pairs: Sequence[LengthPair], cap: int | None) -> Markup:
    """Draw the thinking tokens of both arms, one point per prompt; above the diagonal pruning thinks longer.

    Draws every k-th point where there are more than 2000.
    """
    if not pairs:
        return Markup("")
    step = -(-len(pairs) // _POINTS)
    longest = max(max(pair.dense, pair.pruned) for pair in pairs)
    x, y = _x_scale(0, longest), _y_scale(0, longest)
    end = x.ticks[-1]
    marks = [
        _axes(x, y, "dense: thinking tokens", "pruned: thinking tokens"),
        f'<line class="guide" x1="{x(0):.1f}" y1="{y(0):.1f}" x2="{x(end):.1f}" y2="{y(end):.1f}"/>',
    ]
    if cap is not None and cap <= end:
        marks.append(_cap_line(x, y, cap))
    # Those that pruning lost come last, on top.
    for pair in sorted(pairs[::step], key=lambda pair: ("same", "won", "lost").index(pair.outcome)):
        marks.append(
            f'<circle class="{pair.outcome}" cx="{x(pair.dense):.1f}" cy="{y(pair.pruned):.1f}" r="3.5">'
            f"<title>prompt {pair.prompt}: {pair.dense} dense, {pair.pruned} pruned</title></circle>"
        )
    return _svg(marks, "Thinking tokens of the pruned model against the dense one, by prompt")


def length_histogram(dense: Sequence[int], pruned: Sequence[int], cap: int | None) -> Markup:
    """Draw how often each thinking length occurs, both arms side by side, with the cap."""
    if not dense and not pruned:
        return Markup("")
    x = _x_scale(0, max([*dense, *pruned, cap or 0, 1]))
    width = x.ticks[-1] / _BINS
    counts = [[0] * _BINS for _ in range(2)]
    for arm, lengths in enumerate((dense, pruned)):
        for length in lengths:
            counts[arm][min(int(length / width), _BINS - 1)] += 1
    y = _y_scale(0, max(max(counts[0]), max(counts[1]), 1))
    marks = [_axes(x, y, "thinking tokens", "prompts")]
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
        marks.append(_cap_line(x, y, cap))
    return _svg(marks, "Histogram of thinking tokens, dense and pruned")


def heat_map(linears: Iterable[LinearRow], value: Callable[[LinearRow], float | None], label: str) -> Markup:
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
    side = min(26.0, max(7.0, 420 / len(blocks)))
    marks = [_text(_HEAT_LEFT - 8, row * 24 + 16, kind, anchor="end") for row, kind in enumerate(kinds)]
    for (kind, block), number in means.items():
        shade = 0.12 + 0.88 * ((number - low) / (high - low) if high > low else 0.5)
        marks.append(
            f'<rect class="heat" x="{_HEAT_LEFT + blocks.index(block) * side:.1f}" '
            f'y="{kinds.index(kind) * 24}" width="{side - 1:.1f}" height="23" fill-opacity="{shade:.2f}">'
            f"{_title(f'block {block}, {kind}: {number:.4g}')}</rect>"
        )
    bottom = len(kinds) * 24 + 14
    for column in range(0, len(blocks), max(1, math.ceil(28 / side))):
        marks.append(_text(_HEAT_LEFT + (column + 0.5) * side, bottom, str(blocks[column])))
    legend = f"block; faint is {low:.3g}, strong is {high:.3g}" if high > low else f"block; all are {low:.3g}"
    marks.append(_text(_HEAT_LEFT, bottom + 20, legend, "label", "start"))
    return _svg(marks, label, max(_HEAT_LEFT + len(blocks) * side, _WIDTH), bottom + 28)


def _arm_mark(arm: ArmSummary, length: float, x: _Scale, y: _Scale) -> str:
    across, up = x(length), y(arm.accuracy)
    side, anchor = (-11, "end") if across > _WIDTH * 0.75 else (11, "start")
    kind = arm.name if arm.name in ("dense", "pruned") else "rival"
    return (
        f'<g class="arm {kind}">{_title(f"{arm.name}: {arm.accuracy:.1%}, {length:.1f} tokens")}'
        f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{y(arm.accuracy_lower):.1f}" '
        f'y2="{y(arm.accuracy_upper):.1f}"/><circle cx="{across:.1f}" cy="{up:.1f}" r="6"/>'
        f"{_text(across + side, up - 8, arm.name, 'name', anchor)}</g>"
    )


def _place(name: str) -> tuple[str, int]:
    """Split a linear's name into its kind and its block, experts and the like folded into ``*``."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    if match is None:
        return name, 0
    kind = re.sub(r"\.\d+\.", ".*.", match.group(2))
    return kind.removeprefix("self_attn.").removeprefix("mlp."), int(match.group(1))


def _x_scale(low: float, high: float) -> _Scale:
    return _Scale.over(low, high, _LEFT, _WIDTH - _RIGHT)


def _y_scale(low: float, high: float) -> _Scale:
    return _Scale.over(low, high, _HEIGHT - _BOTTOM, _TOP)


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str, y_text: Callable[[float], str] = "{:g}".format) -> str:
    floor, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
    marks = [_text(x(tick), floor + 17, f"{tick:g}") for tick in x.ticks]
    for tick in y.ticks:
        up = f"{y(tick):.1f}"
        marks.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up}" y2="{up}"/>')
        marks.append(_text(_LEFT - 8, y(tick) + 4, y_text(tick), anchor="end"))
    marks.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "label"))
    turned = f'<g transform="translate(13 {middle}) rotate(-90)">{_text(0, 0, y_label, "label")}</g>'
    return "".join([*marks, turned])


def _cap_line(x: _Scale, y: _Scale, cap: int) -> str:
    across = x(cap)
    return (
        f'<line class="cap" x1="{across:.1f}" x2="{across:.1f}" y1="{y.start}" y2="{y.stop}"/>'
        f"{_text(across - 5, y.stop + 11, f'cap {cap}', anchor='end')}"
    )


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw a line that ends short of both circles, with a head."""
    length = math.hypot(x2 - x1, y2 - y1)
    if length < 24:
        return ""
    across, down = (x2 - x1) / length, (y2 - y1) / length
    tip_x, tip_y = x2 - 9 * across, y2 - 9 * down
    base_x, base_y = tip_x - 9 * across, tip_y - 9 * down
    points = " ".join(
        f"{px:.1f},{py:.1f}"
        for px, py in (
            (tip_x, tip_y),
            (base_x - 4.5 * down, base_y + 4.5 * across),
            (base_x + 4.5 * down, base_y - 4.5 * across),
        )
    )
    return (
        f'<g class="arrow"><line x1="{x1 + 8 * across:.1f}" y1="{y1 + 8 * down:.1f}" x2="{base_x:.1f}" '
        f'y2="{base_y:.1f}"/><polygon points="{points}"/></g>'
    )


def _text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(plain(content))}</text>'


def _title(content: str) -> str:
    return f"<title>{escape(plain(content))}</title>"


def _svg(marks: Iterable[str], label: str, width: float = _WIDTH, height: float = _HEIGHT) -> Markup:
    body = "".join(marks)
    return Markup(  # every text in it went through escape()
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
