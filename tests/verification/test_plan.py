"""The plan: what a verification can decide before it runs."""

from __future__ import annotations

import pytest

from racdeploy.recipe import Verification
from racdeploy.verification.gate import read_gate
from racdeploy.verification.plan import Expectation, estimate_from_arms, plan_power
from racdeploy.verification.stats.lengths import length_deviation, smallest_detectable_ratio
from racdeploy.verification.stats.paired import power
from tests.support.records import arm_of, record


def test_the_plan_gives_power_and_what_can_be_seen() -> None:
    """200 prompts, a tenth of them discordant: 6 points are seen with 80 % power, 5 points are
    not.
    """
    found = plan_power(Verification(), read_gate(), Expectation(), 200)
    assert found.accuracy_power == pytest.approx(power(200, 0.1, 0.05), abs=5e-4)
    assert found.smallest_detectable_drop == pytest.approx(0.058, abs=1e-3)
    assert found.accuracy_power < 0.8
    assert found.smallest_detectable_ratio == pytest.approx(
        smallest_detectable_ratio(200, 0.3), abs=5e-4
    )


def test_one_prompt_decides_nothing() -> None:
    """And the plan says so instead of failing."""
    found = plan_power(Verification(), read_gate(), Expectation(), 1)
    assert (found.accuracy_power, found.smallest_detectable_ratio) == (0.0, None)


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
