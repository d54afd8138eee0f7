"""Statistical power of a verification, computed before it runs.

Several samples of a prompt count as one, so the power is never overstated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.recipe import Verification
from racdeploy.results.plan import PowerPlan
from racdeploy.verification.checks import accuracy, thinking
from racdeploy.verification.evidence import ArmResult, is_correct, thinking_tokens
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats import lengths, paired
from racdeploy.verification.stats.distributions import normal_quantile
from racdeploy.verification.stats.group_sequential import Analysis

_PAIRS = 4000  # simulated: their mean number of prompts has an error of about 5


@dataclass(frozen=True)
class Expectation:
    """Expected behaviour of the arms.

    Args:
        discordant_rate: share of prompts on which one arm is right and the other wrong.
        length_deviation: from :func:`racdeploy.verification.stats.lengths.length_deviation`.
    """

    discordant_rate: float = 0.10
    length_deviation: float = 0.30


def estimate_from_arms(dense: ArmResult, pruned: ArmResult, budget: int) -> Expectation:
    """Return the behaviour of two arms in an earlier verification, as an expectation.

    At least one prompt counts as discordant: a rate of 0 would promise certainty.
    """
    pairs = dense.count_disagreements(pruned, is_correct)
    discordant = max(pairs.n10 + pairs.n01, 1) / pairs.n

    before = dense.group_by_prompt(thinking_tokens)
    after = pruned.group_by_prompt(thinking_tokens)
    both_think = all(any(map(thinking_tokens, arm.records)) for arm in (dense, pruned))

    # Without thoughts, or with one prompt, there is no spread of lengths to measure.
    deviation = Expectation.length_deviation
    if len(before) > 1 and both_think:
        deviation = lengths.length_deviation(before, after, budget)

    return Expectation(discordant, deviation)


def plan_power(
    settings: Verification, gate: Gate, expected: Expectation, analyses: Sequence[Analysis]
) -> PowerPlan:
    """Return the power of a verification, and the smallest losses that it can detect.

    Of several analyses, the figures are those of the last one by itself.
    """
    prompts, confidence = analyses[-1]
    margin = gate.limits(accuracy.Limits).margin
    discordant = expected.discordant_rate

    accuracy_power = paired.power(prompts, discordant, margin, confidence)
    drop = paired.smallest_detectable_drop(prompts, discordant, confidence)

    ratio = None
    if prompts > 1:  # one prompt has no spread
        deviation = expected.length_deviation
        smallest = lengths.smallest_detectable_ratio(prompts, deviation, confidence)
        ratio = round(smallest, 3)

    return PowerPlan(
        evaluation_prompts=prompts,
        samples=settings.samples,
        discordant_share=round(discordant, 4),
        accuracy_margin=margin,
        accuracy_power=round(accuracy_power, 3),
        smallest_detectable_drop=round(drop, 4),
        length_ratio=gate.limits(thinking.Limits).length_ratio,
        smallest_detectable_ratio=ratio,
        **_plan_interim(gate, expected, analyses),
    )


def _plan_interim(
    gate: Gate, expected: Expectation, analyses: Sequence[Analysis]
) -> dict[str, Any]:
    """Return the fields of a plan that asks until the verdict is clear; empty for one analysis."""
    if len(analyses) == 1:
        return {}
    return {
        "judged_after": tuple(analysis.prompts for analysis in analyses),
        "expected_prompts": round(expect_prompts(gate, expected, analyses), -1),
    }


def expect_prompts(gate: Gate, expected: Expectation, analyses: Sequence[Analysis]) -> int:
    """Return how many prompts two equally good models are asked on average.

    A pair ends where the intervals of both differences are below their limits. No answer has a
    fault: it takes some prompts to show even that.
    """
    limits = gate.limits(thinking.Limits)
    margin = gate.limits(accuracy.Limits).margin
    differences = (
        _NormalDifference(margin, math.sqrt(expected.discordant_rate)),
        _NormalDifference(math.log(limits.length_ratio), expected.length_deviation),
    )

    shares = [getattr(limits, fault) for fault in limits.SHARES]
    smallest_share = min(shares)

    generator = np.random.default_rng(0)
    asked_P = np.full(_PAIRS, analyses[-1].prompts)
    is_open_P = np.ones(_PAIRS, dtype=bool)
    before = 0
    for analysis in analyses:
        prompts, confidence = analysis
        for difference in differences:
            difference.add(prompts - before, generator)
        before = prompts

        faults = paired.drop_interval(0, 0, prompts, confidence)
        if faults.upper >= smallest_share:
            continue

        ends_P = is_open_P.copy()
        for difference in differences:
            ends_P &= difference.is_shown(analysis)
        asked_P[ends_P] = prompts
        is_open_P[ends_P] = False

    return round(float(asked_P.mean()))


class _NormalDifference:
    """A difference of equal models in many pairs, whose mean over the prompts is normal.

    Args:
        limit: largest difference that passes.
        deviation: of one prompt.
    """

    def __init__(self, limit: float, deviation: float) -> None:
        self.limit = limit
        self.deviation = deviation
        self.sum_P = np.zeros(_PAIRS)

    def add(self, prompts: int, generator: np.random.Generator) -> None:
        """Ask more prompts."""
        added_P = generator.standard_normal(_PAIRS)
        self.sum_P += self.deviation * math.sqrt(prompts) * added_P

    def is_shown(self, analysis: Analysis) -> NDArray[np.bool_]:
        """Return for which pairs the whole interval is below the limit."""
        prompts, confidence = analysis
        error = self.deviation / math.sqrt(prompts)
        upper_P = self.sum_P / prompts + normal_quantile(confidence) * error
        return np.asarray(upper_P < self.limit)
