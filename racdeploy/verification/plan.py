"""Statistical power of a verification, computed before it runs.

Several samples of a prompt count as one, so the power is never overstated.
"""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.recipe import Verification
from racdeploy.results.plan import PowerPlan
from racdeploy.verification.checks import accuracy, thinking
from racdeploy.verification.evidence import ArmResult, is_correct, thinking_tokens
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats import lengths, paired


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
    settings: Verification, gate: Gate, expected: Expectation, prompts: int
) -> PowerPlan:
    """Return the power of a verification, and the smallest losses that it can detect."""
    confidence = gate.confidence
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
    )
