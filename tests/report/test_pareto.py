"""Pareto front, and the comparison with dense rivals."""

from __future__ import annotations

from racdeploy.report.pareto import describe_front, find_pareto_front
from racdeploy.report.tables import list_tables
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


def test_the_front_is_one_sentence(report: Report) -> None:
    """With rivals only; the comparison of dense and pruned has its own."""
    assert describe_front(report) == (
        "Pareto front of size, speed, accuracy and thinking: dense, pruned, dense q4_k, dense q2_k."
    )
    assert describe_front(report.model_copy(update={"rivals": ()})) == ""


def test_each_rival_has_a_row_with_its_intervals(report: Report) -> None:
    """The gain in accuracy and the thinking, each over the pruned model."""
    (table,) = (each for each in list_tables(report) if each.title.startswith("Comparison"))
    assert table.rows == (
        ("dense q4_k", "−0.4 (−2.0 to 1.2)", "1.04 (1.01 to 1.08)"),
        ("dense q2_k", "−7.4 (−11.0 to −4.0)", "1.10 (1.06 to 1.15)"),
    )
