"""Sentences of a thought, by kind."""

from __future__ import annotations

from racdeploy.report import html
from racdeploy.report.sentences import count_sentences
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report

TALKATIVE = """\
Step 1: 7 * 8 = 56. Wait, is that right? 7 * 8 = 56.
Hmm, 1.5 kg each. Let me check this. step 1: 7 * 8  = 56
Wait, let me start again.
But waiting is no hesitation of its own; I restarted nothing.
"""


def test_each_kind_is_counted() -> None:
    """By hand; a number has no end of a sentence in it, and spaces and case make no other one."""
    counts = {kind: count for kind, count in count_sentences([TALKATIVE]).items() if count}
    assert counts == {
        "all": 8,
        "repeat an earlier one": 1,
        "check": 1,
        "start again": 1,
        "begin with Wait": 2,
        "begin with Hmm": 1,
        "begin with But": 1,
    }
    assert count_sentences([TALKATIVE, "", TALKATIVE])["all"] == 16


def test_a_thought_without_an_end_is_counted() -> None:
    """Patterns that look at more than the beginning of a sentence would take hours here."""
    counts = count_sentences(["try " * 1_000_000, "try-" * 1_000_000, "try\n" * 100_000])
    assert counts["all"] == 100_002
    assert counts["repeat an earlier one"] == 99_999


def test_the_page_has_what_each_model_says(report: Report, records: list[AnswerRecord]) -> None:
    """On average over the pairs; kinds that nobody says are left out."""
    texts = {"dense": TALKATIVE, "pruned": "Step 1: 7 * 8 = 56."}
    said = [each.model_copy(update={"thinking_text": texts[each.arm]}) for each in records]
    page = html.render(report, said)
    table = page.partition("Sentences of a thought")[2].partition("</table>")[0]
    cells = table.replace("</td>", "").replace("</th>", "").split("\n")
    assert any("begin with Wait" in cell for cell in cells)
    assert "2.00" in table
    assert "8.00" in table
    assert "begin with Maybe" not in table
