"""The thinking check: longer thoughts, unclosed ones, loops and forced ends, each by itself."""

from __future__ import annotations

import numpy as np
import pytest

from racdeploy.recipe import Verification
from racdeploy.verification.checks import thinking
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record

PROMPTS = 200


def _check(pruned: list[object], settings: Verification | None = None) -> tuple[str, str]:
    dense = arm_of([record(index) for index in range(PROMPTS)])
    evidence = make_evidence(dense, arm_of(pruned), settings=settings)
    found = thinking.check(evidence)
    return found.verdict, found.summary


@pytest.mark.parametrize("lost", [0, 30])
@pytest.mark.parametrize(
    ("fault", "values"),
    [
        ("unclosed", {"state": "open"}),
        ("loops", {"loop_tokens": 80}),
        ("forced", {"state": "forced"}),
    ],
)
def test_each_fault_fails_by_itself(fault: str, values: dict[str, object], lost: int) -> None:
    """15 % of the prompts against a limit of 5 %; the summary leads with the fault."""
    verdict, summary = _check(
        [record(index, **(values if index < lost else {})) for index in range(PROMPTS)]
    )
    assert verdict == ("fail" if lost else "pass")
    assert summary.startswith(f"{fault}: ") == bool(lost)
    assert f"{fault} 0 → {lost}" in summary


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "pass"), (1.3, "fail"), (1.2, "inconclusive")]
)
def test_length_is_judged_by_its_ratio(factor: float, verdict: str) -> None:
    """30 % more thinking fails 1.2 although every answer is right."""
    generator = np.random.default_rng(0)
    lengths = np.rint(100 * factor * generator.lognormal(-0.005, 0.1, PROMPTS)).astype(int)
    found, summary = _check(
        [record(index, thinking_tokens=int(n)) for index, n in enumerate(lengths)]
    )
    assert found == verdict
    assert verdict == "pass" or summary.startswith("length: ")


def test_a_truncated_thought_counts_as_the_budget() -> None:
    """Both arms are restricted to the same number of tokens."""
    settings = Verification(max_new_tokens=150)
    records = [record(index, thinking_tokens=400 if index % 2 else 100) for index in range(PROMPTS)]
    assert "length ratio 1.250" in _check(records, settings)[1]  # (100 + 150) / 2 over 100


def test_a_model_that_does_not_think_is_judged_by_its_completion() -> None:
    """Where dense has no thinking tokens, the answer's length counts."""
    dense, pruned = (
        arm_of(
            [record(i, thinking_tokens=0, answer_tokens=n, state="absent") for i in range(PROMPTS)]
        )
        for n in (50, 51)
    )
    found = thinking.check(make_evidence(dense, pruned))
    assert (found.verdict, found.summary.startswith("completion length ratio 1.020")) == (
        "pass",
        True,
    )


def test_the_samples_of_a_prompt_are_one_prompt() -> None:
    """Eight equal samples of 40 prompts say no more than one sample of each."""

    def arms(samples: int) -> list[object]:
        return [
            record(i, sample=s, thinking_tokens=100 + i % 7)
            for i in range(40)
            for s in range(samples)
        ]

    one, eight = (thinking.check(make_evidence(arm_of(arms(n)), arm_of(arms(n)))) for n in (1, 8))
    assert (one.verdict, eight.verdict) == (
        "inconclusive",
        "inconclusive",
    )  # 40 prompts prove no 5 %
