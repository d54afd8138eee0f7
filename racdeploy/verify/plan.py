"""What a verification can decide, before it runs: prompts, power, the smallest drop and ratio it can see.

The share of prompts on which the arms will disagree and how much lengths vary are taken from an earlier verification
of the same bundle, or assumed. Samples of a prompt add certainty that is not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from racdeploy.recipe import Verification
from racdeploy.verify import stats
from racdeploy.verify.checks import accuracy, thinking
from racdeploy.verify.evidence import Arm
from racdeploy.verify.gate import Gate

_TARGET_POWER = 0.8


@dataclass(frozen=True)
class Expectation:
    """What the arms are expected to do.

    Args:
        discordant: share of prompts on which one arm is right and the other wrong.
        deviation: of the lengths, see :func:`racdeploy.verify.stats.length_deviation`.
        source: where both come from.
    """

    discordant: float = 0.10
    deviation: float = 0.30
    source: str = "assumed"


def expectation_of(dense: Arm, pruned: Arm, budget: int) -> Expectation:
    """Return what two arms did in an earlier verification; no share is taken to be below one prompt in all."""
    pairs = stats.paired_counts(
        *(arm.by_prompt(lambda record: record.correct) for arm in (dense, pruned))
    )
    before, after = (
        arm.by_prompt(lambda record: record.thinking_tokens) for arm in (dense, pruned)
    )
    thinks = len(before) > 1 and all(any(map(any, rows)) for rows in (before, after))
    deviation = stats.length_deviation(before, after, budget) if thinks else Expectation.deviation
    return Expectation(
        max(pairs.n10 + pairs.n01, 1) / pairs.n, deviation, "as in the bundle's own verification"
    )


def plan(settings: Verification, gate: Gate, expected: Expectation, prompts: int) -> dict[str, Any]:
    """Return the figures of a verification that has not run yet."""
    margin, confidence = gate.limits(accuracy.Limits).margin, gate.confidence
    ratio = gate.limits(thinking.Limits).length_ratio
    power = smallest = None  # one prompt has no spread
    if prompts > 1:
        power = round(stats.length_power(prompts, expected.deviation, ratio, confidence), 3)
        smallest = round(
            stats.smallest_detectable_ratio(prompts, expected.deviation, confidence, _TARGET_POWER),
            3,
        )
    return {
        "evaluation_prompts": prompts,
        "samples": settings.samples,
        "discordant_share": round(expected.discordant, 4),
        "length_deviation": round(expected.deviation, 4),
        "expectation": expected.source,
        "accuracy_margin": margin,
        "accuracy_power": round(stats.power(prompts, expected.discordant, margin, confidence), 3),
        "smallest_detectable_drop": round(
            stats.smallest_detectable_drop(prompts, expected.discordant, confidence, _TARGET_POWER),
            4,
        ),
        "length_ratio": ratio,
        "length_power": power or 0.0,
        "smallest_detectable_ratio": smallest,
    }
