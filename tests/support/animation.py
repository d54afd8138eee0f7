"""A recording of a terminal as a moving SVG: a film strip behind a window, moved by CSS alone.

Each line is drawn once and used by the frames that show it. Where nothing may move, and where CSS
does not run, the last frame is what is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

import pyte
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from tests.support.drawing import Screen, read_line

_WIDE, _HIGH, _BASE = 8.4, 20, 15  # a cell of a font of 14 pixels
_LEFT, _TOP, _MARGIN = 14, 46, 12
_FRAMES = 90
_LONGEST_WAIT_S = 3.0
_LASTS_S, _ENDS_S = 16.0, 8.0
_CONSOLE = Console()
_BACKGROUND, _INK = "#292929", "#c5c8c6"

Recorded = Sequence[tuple[float, str]]
Frame = tuple[Text, ...]


def animate(recorded: Recorded, columns: int, rows: int) -> str:
    """Return an SVG that shows pieces of output, with the seconds at which they came, in 16 s."""
    frames = _photograph(_shorten_waits(recorded), columns, rows)
    width = columns * _WIDE + 2 * _LEFT
    height = rows * _HIGH + _TOP + _MARGIN
    strip_height = rows * _HIGH

    known: dict[str, int] = {}
    drawn = []
    strip = []
    for number, (_, lines) in enumerate(frames):
        for row, line in enumerate(lines):
            if not line.plain:
                continue

            markup = _draw_line(line)
            place = known.setdefault(markup, len(known))
            if place == len(drawn):
                drawn.append(f'<g id="l{place}">{markup}</g>')
            strip.append(f'<use href="#l{place}" y="{number * strip_height + row * _HIGH}"/>')

    return _PAGE.format(
        width=width,
        height=height,
        strip_width=width - 2 * _LEFT,
        strip_height=strip_height,
        steps=_write_steps([time for time, _ in frames], strip_height),
        last=-strip_height * (len(frames) - 1),
        lasts_s=_LASTS_S + _ENDS_S,
        lines="\n".join(drawn),
        strip="\n".join(strip),
        background=_BACKGROUND,
        ink=_INK,
        left=_LEFT,
        top=_TOP,
        middle=width / 2,
    )


def _shorten_waits(recorded: Recorded) -> Recorded:
    """Return a recording in which nothing stands still for longer than a few seconds."""
    shorter = []
    before_s = now_s = 0.0
    for time_s, text in recorded:
        now_s += min(time_s - before_s, _LONGEST_WAIT_S)
        before_s = time_s
        shorter.append((now_s, text))
    return shorter


def _photograph(recorded: Recorded, columns: int, rows: int) -> list[tuple[float, Frame]]:
    """Return what is on the screen at up to 90 times, without what did not change."""
    screen = Screen(columns, rows)
    stream = pyte.Stream(screen)
    every_s = recorded[-1][0] / _FRAMES

    frames: list[tuple[float, Frame]] = []
    for number, (time_s, text) in enumerate(recorded):
        stream.feed(text)
        is_last = number == len(recorded) - 1
        if frames and time_s - frames[-1][0] < every_s and not is_last:
            continue

        frame = tuple(read_line(screen, row) for row in range(rows))
        if not frames or frame != frames[-1][1]:
            frames.append((time_s, frame))

    return frames


def _write_steps(times_s: Sequence[float], strip_height: int) -> str:
    """Return the key frames: which frame from which share of the time on."""
    moving = _LASTS_S / (_LASTS_S + _ENDS_S)
    steps = []
    for number, time_s in enumerate(times_s):
        share = 100 * moving * (time_s - times_s[0]) / (times_s[-1] - times_s[0] or 1)
        steps.append(f"{share:.2f}%{{transform:translateY({-number * strip_height}px)}}")
    return "".join(steps)


def _draw_line(line: Text) -> str:
    """Return a text for each run of one style, as wide as its cells."""
    parts = []
    column = 0
    for segment in line.render(_CONSOLE):
        text = segment.text
        start, column = column, column + len(text)
        if not text.strip():
            continue

        colour = segment.style.color if segment.style else None
        fill = f' fill="{colour.get_truecolor(SVG_EXPORT_THEME).hex}"' if colour else ""
        weight = ' font-weight="bold"' if segment.style and segment.style.bold else ""
        place = f'x="{start * _WIDE:.1f}" y="{_BASE}" textLength="{len(text) * _WIDE:.1f}"'
        parts.append(f"<text {place}{fill}{weight}>{escape(text)}</text>")

    return "".join(parts)


_PAGE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" fill="{ink}">
<style>
text {{ font-family: Fira Code, DejaVu Sans Mono, Menlo, Consolas, monospace; font-size: 14px;
  white-space: pre }}
.title {{ font-family: sans-serif; font-weight: bold; text-anchor: middle }}
.strip {{ transform: translateY({last}px) }}
@media (prefers-reduced-motion: no-preference) {{
  .strip {{ animation: {lasts_s:g}s step-end infinite film }}
  @keyframes film {{ {steps} }}
}}
</style>
<defs>
{lines}
</defs>
<rect width="100%" height="100%" rx="8" fill="{background}"/>
<circle cx="20" cy="20" r="6" fill="#ff5f57"/>
<circle cx="42" cy="20" r="6" fill="#febc2e"/>
<circle cx="64" cy="20" r="6" fill="#28c840"/>
<text class="title" x="{middle:.0f}" y="25">racdeploy</text>
<svg x="{left}" y="{top}" width="{strip_width:.0f}" height="{strip_height}">
<g class="strip">
{strip}
</g>
</svg>
</svg>
"""
