"""Gains and losses in sentences: size, parameters, speed and accuracy."""

from __future__ import annotations

import pytest

from racdeploy.report.gains import describe_gains
from racdeploy.results.answers import Comparison
from racdeploy.results.pruning import KeptStructure
from racdeploy.results.report import Report


def test_gains_are_sentences_with_both_figures(report: Report) -> None:
    """Smaller, faster, and no loss that could be told from chance."""
    assert describe_gains(report) == [
        "the file is 63% smaller: 14.2 MB → 5.31 MB",
        "1.48 times as fast: 812 → 1,205 tokens/s",
        "No measurable loss: 0.8 points, at most 2.6 (margin 5.0, 256 prompts).",
    ]


def test_no_gain_is_said_as_well(report: Report) -> None:
    """Equal files and speeds; what was not measured is left out."""
    dense, *_ = report.arms
    equal = report.model_copy(update={"arms": (dense, dense.model_copy(update={"name": "pruned"}))})
    assert describe_gains(equal)[:2] == [
        "the file is as large as the dense one: 14.2 MB → 14.2 MB",
        "as fast as the dense one: 812 → 812 tokens/s",
    ]
    unmeasured = dense.model_copy(update={"tokens_per_s": None, "size_bytes": None})
    arms = (unmeasured, unmeasured.model_copy(update={"name": "pruned"}))
    alone = report.model_copy(update={"arms": arms, "comparison": None})
    assert describe_gains(alone) == []


def test_fewer_parameters_are_counted(report: Report) -> None:
    """Where structure was cut."""
    kept = KeptStructure(
        parameters=750,
        parameters_dense=1000,
        blocks=2,
        blocks_dense=2,
        key_value_heads=2,
        key_value_heads_dense=2,
        vocabulary=9,
        vocabulary_dense=9,
    )
    assert "25% fewer parameters: 1,000 → 750" in describe_gains(
        report.model_copy(update={"kept_structure": kept})
    )


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
    *_, last = describe_gains(report.model_copy(update={"comparison": comparison}))
    assert last.startswith(sentence)
