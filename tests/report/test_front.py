"""Who wins where: the front, and sentences that say no more than the intervals do."""

from __future__ import annotations

from racdeploy.report.front import front, who_wins
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
    assert front([best, beaten, small]) == {"best", "small"}


def test_equal_arms_share_the_front() -> None:
    """Neither beats the other."""
    assert front([_arm("a", 250, 100, 50.0, 140), _arm("b", 250, 100, 50.0, 140)]) == {"a", "b"}


def test_a_speed_that_one_arm_lacks_decides_nothing() -> None:
    """With it, the slow arm would stay on the front; its rival's is unknown."""
    fast, unknown = _arm("fast", 240, 100, 90.0, 140), _arm("unknown", 250, 90, None, 130)
    assert front([fast, unknown]) == {"unknown"}


def test_the_sentences_follow_the_intervals(report: Report) -> None:
    """Two rivals of the sample: an even one, and one that is smaller and worse."""
    even, small, whole = who_wins(report)
    assert even.startswith(
        "dense q4_k against pruned: pruned wins on thinking (1.04 times as long, 1.01 to 1.08)"
    )
    assert "even on size (5.3 MB, pruned 5.31 MB), speed" in even
    assert "accuracy (−0.4 points, −2.0 to 1.2)." in even
    assert "dense q2_k wins on size (3.9 MB, pruned 5.31 MB)" in small
    assert "pruned wins on speed (0.91 times that of pruned), accuracy (−7.4 points" in small
    assert (
        whole == "On the front of size, speed, accuracy and thinking: dense, pruned, dense q4_k, "
        "dense q2_k."
    )


def test_without_a_rival_nothing_is_said(report: Report) -> None:
    """The comparison of dense and pruned has its own sentence."""
    assert who_wins(report.model_copy(update={"rivals": ()})) == []
