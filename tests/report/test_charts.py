"""Chart of both models: thinking prompt by prompt."""

from __future__ import annotations

import itertools
import re

import pytest

from racdeploy.report import charts, html
from racdeploy.report.pairs import AnswerPair
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report


def _pairs(records: list[AnswerRecord], lengths: list[tuple[int, int]]) -> list[AnswerPair]:
    """Return pairs with these thinking tokens, of two tasks in turn."""
    pairs = []
    for prompt, (dense, pruned) in enumerate(lengths):
        about = {"prompt": prompt, "task": "gcd" if prompt % 2 else "sum"}
        pairs.append(
            AnswerPair(
                records[0].model_copy(update=about | {"thinking_tokens": dense}),
                records[1].model_copy(update=about | {"thinking_tokens": pruned}),
            )
        )
    return pairs


def _dots(drawn: str) -> dict[int, tuple[float, float]]:
    """Return the place of each prompt."""
    found = re.findall(r'data-prompt="(\d+)" cx="([\d.]+)" cy="([\d.]+)"', drawn)
    return {int(prompt): (float(x), float(y)) for prompt, x, y in found}


def test_one_outlier_does_not_squeeze_the_others(records: list[AnswerRecord]) -> None:
    """199 prompts between 100 and 298 tokens keep room beside one of 1,024 or of 16,384."""
    lengths = [(100 + i, 99 + i) for i in range(199)]
    for longest, share in ((300, 0.5), (1024, 0.3), (16_384, 0.18)):
        drawn = charts.draw_thinking_by_prompt(_pairs(records, [*lengths, (150, longest)]), None)
        across = [x for prompt, (x, _) in _dots(drawn).items() if prompt < 199]
        assert max(across) - min(across) > share * (charts.RIGHT - charts.LEFT)
        assert "prompt 199: 150 dense, " in drawn


def test_the_distance_from_the_diagonal_is_the_ratio(records: list[AnswerRecord]) -> None:
    """Equal thoughts are on a line of 45 degrees, and twice as long is as far up everywhere."""
    pairs = _pairs(records, [(10, 10), (100, 100), (200, 200), (50, 100), (200, 400)])
    places = _dots(charts.draw_thinking_by_prompt(pairs, None))
    for first, second in ((0, 1), (1, 2)):
        across = places[second][0] - places[first][0]
        up = places[first][1] - places[second][1]
        assert across == pytest.approx(up, abs=0.11)
    above = [y - (456 - x) for x, y in (places[3], places[4])]
    assert above[0] == pytest.approx(above[1], abs=0.21)


def test_the_cap_is_on_both_axes(records: list[AnswerRecord]) -> None:
    """Where it is on the axes; where it is far beyond, the page says it."""
    near = _pairs(records, [(100, 120), (500, 512), (300, 512)])
    assert charts.draw_thinking_by_prompt(near, 512).count('class="cap"') == 2

    far = _pairs(records, [(100, 120)] * 40)
    assert 'class="cap"' not in charts.draw_thinking_by_prompt(far, 1024)


def test_no_thinking_at_all_has_a_place(records: list[AnswerRecord]) -> None:
    """At one token, the end of an axis that has no zero."""
    places = _dots(charts.draw_thinking_by_prompt(_pairs(records, [(0, 0), (8, 0)]), None))
    assert places[0] == (charts.LEFT, charts.BOTTOM)
    assert places[1][1] == charts.BOTTOM


def test_powers_cover_the_range_in_few_steps() -> None:
    """Whatever the range; a power at an end adds no step."""
    for low, high in itertools.combinations([1, 8, 100, 1000, 131_072], 2):
        ticks = charts.list_power_ticks(low, high)
        assert ticks[0] <= low * 1.001
        assert high <= ticks[-1] * 1.001
        assert 2 <= len(ticks) <= 8
    assert charts.list_power_ticks(8, 8) == [8, 16]


def test_tasks_are_listed_from_worst_to_best(report: Report, records: list[AnswerRecord]) -> None:
    """With the change in per cent; one task alone compares nothing."""
    answered = [
        record
        for pair in _pairs(records, [(100, 90), (100, 150)] * 5)
        for record in (pair.dense, pair.pruned)
    ]
    page = html.render(report, answered)
    rows = re.findall(r'<tr><td data-label="task">(\w+)</td>(.*?)</tr>', page)
    cells = [(task, *re.findall(r">([^<]+)</td>", rest)) for task, rest in rows]
    assert cells[:2] == [
        ("gcd", "5", "100.0", "150.0", "+50%"),
        ("sum", "5", "100.0", "90.0", "−10%"),
    ]
    assert "Thinking by task" not in html.render(report, answered[:2])
