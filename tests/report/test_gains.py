"""Gains and losses: the highlights, and the sentence on accuracy."""

from __future__ import annotations

import pytest

from racdeploy.report.gains import list_highlights
from racdeploy.report.summary import describe_accuracy
from racdeploy.results.answers import Comparison
from racdeploy.results.report import Report


def test_highlights_have_both_figures_and_their_change(report: Report) -> None:
    """Smaller, faster, and the intervals of accuracy and thinking."""
    found = [(each.dense, each.pruned, each.note) for each in list_highlights(report)]
    assert found == [
        ("98.4%", "97.7%", "0.8 points lost (−0.7 to 2.6), margin 5.0"),
        ("143.7", "144.1", "1.00 times as long (0.97 to 1.04), limit 1.20"),
        ("14.2 MB", "5.31 MB", "63% smaller"),
        ("812", "1,205", "48% faster"),
    ]


def test_no_gain_is_said_as_well(report: Report) -> None:
    """Equal files and speeds; what was not measured is left out."""
    dense, *_ = report.arms
    equal = report.model_copy(update={"arms": (dense, dense.model_copy(update={"name": "pruned"}))})
    assert [each.note for each in list_highlights(equal)][2:] == ["equal", "equal"]
    unmeasured = dense.model_copy(update={"tokens_per_s": None, "size_bytes": None})
    arms = (unmeasured, unmeasured.model_copy(update={"name": "pruned"}))
    assert len(list_highlights(report.model_copy(update={"arms": arms}))) == 2


@pytest.mark.parametrize(
    ("drop", "lower", "upper", "sentence"),
    [
        (0.1, 0.05, 0.15, "10.0 points fewer right answers (90% interval of the loss 5.0 to 15.0"),
        (-0.1, -0.15, -0.05, "10.0 points more right answers (90% interval of the loss −15.0 to"),
        (
            0.0,
            -0.1,
            0.2,
            "As many right answers, but too few prompts to show that nothing was lost",
        ),
    ],
)
def test_a_measured_difference_is_named(
    report: Report, drop: float, lower: float, upper: float, sentence: str
) -> None:
    """In either direction, once its interval leaves out zero."""
    assert report.comparison
    verdict = "inconclusive" if upper > 0.15 else "pass"
    values = {"drop": drop, "drop_lower": lower, "drop_upper": upper, "verdict": verdict}
    comparison: Comparison = report.comparison.model_copy(update=values)
    assert describe_accuracy(comparison).startswith(sentence)
