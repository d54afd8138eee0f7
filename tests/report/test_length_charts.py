"""Thinking lengths: equal scales, a few thoughts at the cap beside the others, and each task."""

from __future__ import annotations

import itertools
import re

import pytest

from racdeploy.report import axis, length_charts
from racdeploy.report.model import Record
from racdeploy.report.pairs import Pair, lengths_by_task


def _pairs(records: list[Record], lengths: list[tuple[int, int]]) -> list[Pair]:
    """Return pairs with these thinking tokens, of two tasks in turn."""
    pairs = []
    for prompt, (dense, pruned) in enumerate(lengths):
        about = {"prompt": prompt, "task": "gcd" if prompt % 2 else "sum"}
        pairs.append(
            Pair(
                records[0].model_copy(update=about | {"thinking_tokens": dense}),
                records[1].model_copy(update=about | {"thinking_tokens": pruned}),
            )
        )
    return pairs


def _dots(drawn: str) -> dict[int, tuple[float, float]]:
    """Return the place of each prompt that is drawn as a circle."""
    found = re.findall(r'data-prompt="(\d+)" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    return {int(prompt): (float(x), float(y)) for prompt, x, y in found}


@pytest.mark.parametrize("longest", [300, 1024])
def test_one_outlier_does_not_squeeze_the_others(records: list[Record], longest: int) -> None:
    """199 prompts between 100 and 298 tokens fill more than half of the chart either way."""
    lengths = [(100 + i, 99 + i) for i in range(199)]
    drawn = length_charts.paired_lengths(_pairs(records, [*lengths, (150, longest)]), 1024)
    across = [x for x, _ in _dots(drawn).values()]
    assert max(across) - min(across) > 0.5 * (axis.SQUARE.right - axis.SQUARE.left) * 0.8
    assert ('data-prompt="199" x=' in drawn) == (longest == 1024)
    assert ("to 1,024" in drawn) == (longest == 1024)
    assert "prompt 199: 150 dense, " in drawn


def test_equal_thoughts_are_on_a_line_of_45_degrees(records: list[Record]) -> None:
    """A step of dense is as many pixels as a step of pruned, whichever is longer."""
    pairs = _pairs(records, [(10, 10), (100, 100), (200, 200), (50, 400), (40, 399)])
    places = _dots(length_charts.paired_lengths(pairs, None))
    for first, second in ((0, 1), (1, 2)):
        across = places[second][0] - places[first][0]
        up = places[first][1] - places[second][1]
        assert across == pytest.approx(up, abs=0.11)


def test_the_cap_is_on_both_axes(records: list[Record]) -> None:
    """Where it is on the axes; where it is far beyond, the note says it."""
    near = _pairs(records, [(100, 120), (500, 512), (300, 512)])
    assert length_charts.paired_lengths(near, 512).count('class="cap"') == 2
    assert length_charts.length_histogram(near, 512).count('class="cap"') == 1

    far = _pairs(records, [(100, 120)] * 40)
    assert 'class="cap"' not in length_charts.paired_lengths(far, 1024)
    assert length_charts.describe_lengths(far, 1024) == "Thinking is cut at 1,024 tokens."


def test_what_is_at_the_edge_is_said(records: list[Record]) -> None:
    """With how many prompts it is, and from where on."""
    pairs = _pairs(records, [(100, 120)] * 97 + [(90, 1024), (80, 1000)])
    note = length_charts.describe_lengths(pairs, 1024)
    assert note.startswith("2 prompts go beyond 120 tokens, drawn at the edge.")


def test_every_prompt_is_in_the_histogram(records: list[Record]) -> None:
    """Those at the edge have a bar of their own; no bar is beyond the frame."""
    pairs = _pairs(records, [(100, 120)] * 97 + [(90, 1024), (120, 1000)])
    drawn = length_charts.length_histogram(pairs, 1024)
    counted = re.findall(r"<title>(dense|pruned): ([\d,]+) (from|beyond)", drawn)
    totals = {
        name: sum(int(count) for own, count, _ in counted if own == name)
        for name in ("dense", "pruned")
    }
    assert totals == {"dense": 99, "pruned": 99}
    assert ("pruned", "2", "beyond") in counted
    bars = re.findall(r'<rect class="(?:dense|pruned)" x="([\d.]+)"', drawn)
    assert max(map(float, bars)) < axis.FLAT.right


def test_the_texts_of_an_axis_do_not_collide(records: list[Record]) -> None:
    """The last tick and the farthest value, however many digits they have."""
    for farthest in (1024, 16_384, 131_072):
        most = farthest // 8
        pairs = _pairs(records, [(most // 2, most)] * 97 + [(most, farthest)] * 2 + [(farthest, 1)])
        for drawn in (
            length_charts.paired_lengths(pairs, farthest),
            length_charts.length_histogram(pairs, farthest),
        ):
            texts = re.findall(
                r'class="tick" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', drawn
            )
            across = [
                (float(x), anchor, text) for x, y, anchor, text in texts if y in ("414.0", "272.0")
            ]
            spans = sorted(map(_span, across))
            assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
            assert spans[-1][1] <= 460


def _span(text: tuple[float, str, str]) -> tuple[float, float]:
    """Return both ends of a text of 12 pixels, by the width of a digit."""
    place, anchor, words = text
    width = 6.4 * len(words.replace(",", "")) + 3 * words.count(",")
    left = place - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, left + width


def test_tasks_are_drawn_from_worst_to_best(records: list[Record]) -> None:
    """With the change in per cent; one task alone compares nothing."""
    pairs = _pairs(records, [(100, 90), (100, 150)] * 5)
    rows = lengths_by_task(pairs)
    assert [(row.task, row.dense, row.pruned) for row in rows] == [
        ("gcd", 100, 150), ("sum", 100, 90)
    ]  # fmt: skip
    drawn = length_charts.lengths_of_tasks(rows)
    assert re.findall(r">(\+50%|−10%|gcd|sum)<", drawn) == ["gcd", "+50%", "sum", "−10%"]
    assert length_charts.lengths_of_tasks(rows[:1]) == ""
