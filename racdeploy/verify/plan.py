"""What a verification can decide before it runs, samples of a prompt not counted as certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from racdeploy.recipe import Verification
from racdeploy.verify.checks import accuracy, thinking
from racdeploy.verify.evidence import Arm, is_correct, thinking_tokens
from racdeploy.verify.gate import Gate
from racdeploy.verify.stats import lengths, paired

_TARGET_POWER = 0.8
_COUNTS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000, 1500, 2000)
"""Numbers of prompts that people ask for."""


@dataclass(frozen=True)
class Expectation:
    """What the arms are expected to do, and where that comes from.

    ``discordant`` is the share of prompts on which one arm is right and the other wrong,
    ``deviation`` a :func:`racdeploy.verify.stats.lengths.length_deviation`.
    """

    discordant: float = 0.10
    deviation: float = 0.30
    source: str = "assumed"


def expect_as_before(dense: Arm, pruned: Arm, budget: int) -> Expectation:
    """Return what two arms did in an earlier verification; at least one prompt is discordant."""
    pairs = paired.paired_counts(dense.by_prompt(is_correct), pruned.by_prompt(is_correct))
    discordant = max(pairs.n10 + pairs.n01, 1) / pairs.n

    before = dense.by_prompt(thinking_tokens)
    after = pruned.by_prompt(thinking_tokens)
    both_think = all(any(map(thinking_tokens, arm.records)) for arm in (dense, pruned))

    deviation = Expectation.deviation
    if len(before) > 1 and both_think:
        deviation = lengths.length_deviation(before, after, budget)

    return Expectation(discordant, deviation, "as in the bundle's own verification")


def enough_prompts(expected: Expectation, margin: float, confidence: float) -> int | None:
    """Return from how many prompts on a model that is as good passes four times of five."""
    for prompts in _COUNTS:
        if paired.power(prompts, expected.discordant, margin, confidence) >= _TARGET_POWER:
            return prompts
    return None


def plan(settings: Verification, gate: Gate, expected: Expectation, prompts: int) -> dict[str, Any]:
    """Return the figures of a verification that has not run yet."""
    confidence = gate.confidence
    margin = gate.limits(accuracy.Limits).margin
    discordant = expected.discordant

    accuracy_power = paired.power(prompts, discordant, margin, confidence)
    drop = paired.smallest_detectable_drop(prompts, discordant, confidence, _TARGET_POWER)

    length_limit = gate.limits(thinking.Limits).length_ratio
    length_power = 0.0
    ratio = None
    if prompts > 1:  # one prompt has no spread
        deviation = expected.deviation
        length_power = lengths.length_power(prompts, deviation, length_limit, confidence)
        smallest = lengths.smallest_detectable_ratio(prompts, deviation, confidence, _TARGET_POWER)
        ratio = round(smallest, 3)

    return {
        "evaluation_prompts": prompts,
        "samples": settings.samples,
        "discordant_share": round(discordant, 4),
        "length_deviation": round(expected.deviation, 4),
        "expectation": expected.source,
        "accuracy_margin": margin,
        "accuracy_power": round(accuracy_power, 3),
        "smallest_detectable_drop": round(drop, 4),
        "length_ratio": length_limit,
        "length_power": round(length_power, 3),
        "smallest_detectable_ratio": ratio,
    }
