"""Pareto front, and comparisons that state no more than the intervals show."""

from __future__ import annotations

from racdeploy.report.pareto import describe_rivals, find_pareto_front
from racdeploy.results.answers import ArmSummary
from racdeploy.results.report import Report
from tests.support.sample_report import arm


def _arm(
    name: str, correct: int, size_bytes: int, tokens_per_s: float | None, thinking: float
) -> ArmSummary:
    return arm(
        name,
        correct,
        size_bytes=size_bytes,
        tokens_per_s=tokens_per_s,
        thinking_tokens_mean=thinking,
    )


def test_an_arm_that_loses_in_everything_is_off_the_front() -> None:
    """Beaten in one thing and equalled in the rest is enough; ahead in one thing keeps a place."""
    best, beaten = _arm("best", 250, 100, 50.0, 140), _arm("beaten", 250, 100, 50.0, 141)
    small = _arm("small", 200, 99, 10.0, 300)
    assert find_pareto_front([best, beaten, small]) == {"best", "small"}


def test_equal_arms_share_the_front() -> None:
    """Neither beats the other."""
    assert find_pareto_front([_arm("a", 250, 100, 50.0, 140), _arm("b", 250, 100, 50.0, 140)]) == {
        "a",
        "b",
    }


def test_a_speed_that_one_arm_lacks_decides_nothing() -> None:
    """With it, the slow arm would stay on the front; its rival's is unknown."""
    fast, unknown = _arm("fast", 240, 100, 90.0, 140), _arm("unknown", 250, 90, None, 130)
    assert find_pareto_front([fast, unknown]) == {"unknown"}


def test_the_sentences_follow_the_intervals(report: Report) -> None:
    """Two rivals of the sample: an even one, and one that is smaller and worse."""
    even, small, whole = describe_rivals(report)
    assert even.startswith(
        "dense q4_k compared with pruned: "
        "pruned is better in thinking (1.04 times as long, 1.01 to 1.08)"
    )
    assert "equal in size (5.3 MB, pruned 5.31 MB), speed" in even
    assert "accuracy (−0.4 points, −2.0 to 1.2)." in even
    assert "dense q2_k is better in size (3.9 MB, pruned 5.31 MB)" in small
    assert "pruned is better in speed (0.91 times that of pruned), accuracy (−7.4 points" in small
    assert (
        whole == "Pareto front of size, speed, accuracy and thinking: dense, pruned, dense q4_k, "
        "dense q2_k."
    )


def test_without_a_rival_nothing_is_said(report: Report) -> None:
    """The comparison of dense and pruned has its own sentence."""
    assert describe_rivals(report.model_copy(update={"rivals": ()})) == []
