"""What a harness found of two models: paired by document, and held to the gate's margin."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from racdeploy.harnesses import HarnessScore
from racdeploy.results.answers import HarnessRow, HarnessRun
from racdeploy.verification.evidence import Outcome
from racdeploy.verification.gate import Gate, make_gate_model
from racdeploy.verification.harness import compare, judge
from racdeploy.verification.stats import paired
from racdeploy.verification.stats.means import difference_interval


def _score(figures: list[float], **changes: object) -> HarnessScore:
    samples = {f"document {number}": figure for number, figure in enumerate(figures)}
    value = sum(figures) / len(figures)
    score = HarnessScore(
        "sums", "exact_match", value, len(figures), stderr=0.01, by_document=samples
    )
    return replace(score, **changes)  # type: ignore[arg-type]


def _row(dense: HarnessScore, pruned: HarnessScore) -> HarnessRow:
    (row,) = compare([dense], [pruned], 0.90)
    return row


def _judge(*rows: HarnessRow, **limits: object) -> Outcome:
    run = HarnessRun(name="lm-eval", version="0.4.13", rows=rows)
    gate: Gate = make_gate_model().model_validate(limits)
    return judge(run, gate)


def test_right_answers_are_paired_by_document() -> None:
    """The interval is that of the check of the accuracy, whatever the order of the documents."""
    before, after = _score([1.0] * 80 + [0.0] * 20), _score([0.0] * 5 + [1.0] * 78 + [0.0] * 17)
    mixed = replace(after, by_document=dict(reversed(after.by_document.items())))
    row = _row(before, mixed)

    drop = paired.drop_interval(5, 3, 100, 0.90)
    assert (row.lost, row.won, row.documents, row.unpaired_reason) == (5, 3, 100, "")
    assert row.difference == pytest.approx(-0.02)
    assert (row.lower, row.upper) == (-drop.upper, -drop.lower)


def test_other_figures_have_an_interval_of_the_mean() -> None:
    """As scipy's paired t-test has it."""
    random = np.random.default_rng(0)
    before, after = random.random(30), random.random(30)
    found = difference_interval(before, after, 0.90)
    expected = stats.ttest_rel(after, before).confidence_interval(0.90)
    assert found == pytest.approx((expected.low, expected.high))

    row = _row(_score(before.tolist()), _score(after.tolist()))
    assert (row.lower, row.upper) == pytest.approx(found)
    assert row.lost is None


@pytest.mark.parametrize(
    ("pruned", "reason"),
    [
        (_score([1.0, 0.0], by_document={}), "no figure of every document"),
        (_score([1.0, 0.0], by_document={"a": 1.0, "b": 0.0}), "not asked the same documents"),
        (_score([1.0, 0.0], value=0.7), "not the mean over documents"),
    ],
)
def test_what_cannot_be_paired_says_why(pruned: HarnessScore, reason: str) -> None:
    """Both values are shown, without an interval, and nothing is decided."""
    row = _row(_score([1.0, 1.0]), pruned)
    assert reason in row.unpaired_reason
    assert row.difference == pytest.approx(pruned.value - 1.0)
    assert row.lower is row.upper is row.lost is None
    assert _judge(row).verdict == "measured"


def test_one_document_of_another_figure_has_no_interval() -> None:
    """It shows no spread."""
    assert "spread" in _row(_score([0.3]), _score([0.4])).unpaired_reason


def test_a_figure_that_one_model_lacks_is_left_out() -> None:
    """There is nothing to compare."""
    assert compare([_score([1.0])], [_score([1.0], metric="other")], 0.90) == ()


@pytest.mark.parametrize(
    ("lost", "documents", "verdict"),
    [(0, 200, "pass"), (40, 200, "fail"), (2, 20, "inconclusive")],
)
def test_the_margin_of_the_accuracy_decides(lost: int, documents: int, verdict: str) -> None:
    """A drop that is surely larger fails, one that is surely smaller passes, the rest is open."""
    kept = documents - lost
    row = _row(_score([1.0] * documents), _score([1.0] * kept + [0.0] * lost))
    found = _judge(row, accuracy={"margin": 0.05})
    assert found.verdict == verdict
    assert f"{documents} documents" in found.summary
    assert "sums, exact_match" in found.summary
    assert found.figures["sums exact_match pruned"] == kept / documents


def test_the_worst_figure_decides() -> None:
    """One of several that fails is named."""
    good = _row(_score([1.0] * 200), _score([1.0] * 200))
    bad = _row(_score([1.0] * 200), _score([1.0] * 150 + [0.0] * 50))
    found = _judge(good, bad.model_copy(update={"task": "words"}))
    assert found.verdict == "fail"
    assert "words, exact_match: drop 25.0 points" in found.summary
    assert "the worst of 2 figures" in found.summary


def test_nothing_to_lose_decides_nothing() -> None:
    """Nor does a figure that is better when smaller, nor a gate that leaves out the accuracy."""
    none_right = _row(_score([0.0] * 200), _score([0.0] * 200))
    errors = _row(
        _score([0.0] * 200 + [1.0] * 50, larger_is_better=False),
        _score([0.0] * 250, larger_is_better=False),
    )
    assert _judge(none_right, errors).verdict == "measured"

    fails = _row(_score([1.0] * 200), _score([0.0] * 200))
    assert _judge(fails).verdict == "fail"
    assert _judge(fails, checks=("thinking",)).verdict == "measured"
