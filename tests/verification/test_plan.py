"""The plan: what a verification can decide before it runs."""

from __future__ import annotations

import pytest

from racdeploy.recipe import Verification
from racdeploy.verification.gate import read_gate
from racdeploy.verification.interim import list_analyses
from racdeploy.verification.plan import (
    Expectation,
    estimate_from_arms,
    expect_prompts,
    plan_power,
)
from racdeploy.verification.stats.group_sequential import Analysis
from racdeploy.verification.stats.lengths import length_deviation, smallest_detectable_ratio
from racdeploy.verification.stats.paired import power
from tests.support.records import arm_of, record

GATE = read_gate()


def test_the_plan_gives_power_and_what_can_be_seen() -> None:
    """200 prompts, a tenth of them discordant: 6 points are seen with 80 % power, 5 points are
    not.
    """
    found = plan_power(Verification(), GATE, Expectation(), [Analysis(200, GATE.confidence)])
    assert found.accuracy_power == pytest.approx(power(200, 0.1, 0.05), abs=5e-4)
    assert found.smallest_detectable_drop == pytest.approx(0.058, abs=1e-3)
    assert found.accuracy_power < 0.8
    assert found.smallest_detectable_ratio == pytest.approx(
        smallest_detectable_ratio(200, 0.3), abs=5e-4
    )


def test_one_prompt_decides_nothing() -> None:
    """And the plan says so instead of failing."""
    found = plan_power(Verification(), GATE, Expectation(), [Analysis(1, GATE.confidence)])
    assert (found.accuracy_power, found.smallest_detectable_ratio) == (0.0, None)


def test_a_plan_says_how_many_prompts_equal_models_need() -> None:
    """Of 1,000 about 600, as many as pairs that were simulated answer by answer: 598."""
    analyses = list_analyses(Verification(), GATE, 1000)
    assert expect_prompts(GATE, Expectation(), analyses) == pytest.approx(598, abs=20)

    found = plan_power(Verification(), GATE, Expectation(), analyses)
    assert found.judged_after == (64, 128, 256, 512, 1000)
    assert found.expected_prompts == 600
    assert found.accuracy_power == pytest.approx(
        power(1000, 0.1, 0.05, analyses[-1].confidence), abs=5e-4
    )


def test_models_whose_lengths_never_differed_can_be_planned() -> None:
    """The first analysis whose interval shows that no fault is frequent ends it."""
    analyses = list_analyses(Verification(), GATE, 1000)
    expected = Expectation(discordant_rate=0.001, length_deviation=0.0)
    assert expect_prompts(GATE, expected, analyses) == 512


def test_one_analysis_is_planned_as_before() -> None:
    """Nothing is said of interim analyses."""
    (analysis,) = list_analyses(Verification(), GATE, 999)
    found = plan_power(Verification(), GATE, Expectation(), [analysis])
    assert (found.judged_after, found.expected_prompts) == ((), 0)


def test_an_earlier_verification_is_the_expectation() -> None:
    """Its share of discordant prompts, at least one, and the spread of its lengths."""
    dense = arm_of([record(index, thinking_tokens=100 + index) for index in range(50)])
    pruned = arm_of([record(index, thinking_tokens=120, correct=index > 3) for index in range(50)])
    found = estimate_from_arms(dense, pruned, 1000)
    assert found.discordant_rate == pytest.approx(4 / 50)
    assert found.length_deviation == pytest.approx(
        length_deviation([100 + index for index in range(50)], [120] * 50, 1000)
    )
    assert estimate_from_arms(dense, dense, 1000).discordant_rate == pytest.approx(1 / 50)
    silent = arm_of([record(index, thinking_tokens=0) for index in range(50)])
    assert (
        estimate_from_arms(silent, silent, 1000).length_deviation == Expectation().length_deviation
    )
