"""Accuracy: paired non-inferiority of the pruned artifact against the dense one."""

from __future__ import annotations

from pydantic import Field

from racdeploy.report.model import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence, is_correct
from racdeploy.verify.stats import paired, verdicts

_REMEDIES = {
    "pass": "",
    "fail": "lower the sparsity, calibrate on more traces, or choose a wider quant",
    "inconclusive": "verify on more prompts: verify.count in the recipe, or a larger --tier",
}


class Limits(gate.Limits):
    """Accuracy.

    Args:
        margin: largest accuracy drop that passes, as a fraction.
    """

    margin: float = Field(0.05, gt=0, lt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the whole interval of the accuracy drop is below the margin."""
    margin = evidence.gate.limits(Limits).margin
    confidence = evidence.gate.confidence
    prompts = evidence.prompt_count
    answers = len(evidence.dense.records)

    pairs = evidence.disagreements(is_correct)
    drop = (pairs.n10 - pairs.n01) / pairs.n
    interval = paired.drop_interval(*pairs, confidence)
    figures: dict[str, float | int | str] = {
        "drop": drop,
        "drop_lower": interval.lower,
        "drop_upper": interval.upper,
        "margin": margin,
        "dense_correct": evidence.dense.count(is_correct),
        "pruned_correct": evidence.pruned.count(is_correct),
        "prompts": prompts,
        "answers": answers,
    }
    if not figures["dense_correct"]:
        return CheckResult(
            name="accuracy",
            verdict="inconclusive",
            summary=f"the dense model answers none of {prompts} prompts right, "
            "so there is nothing to lose",
            figures=figures,
            remedy="choose a task the dense model can do: --task",
        )

    verdict = verdicts.judge(interval, margin)
    samples = f" with {answers // prompts} samples each" if answers > prompts else ""
    return CheckResult(
        name="accuracy",
        verdict=verdict,
        summary=f"drop {drop:+.1%}, {confidence:.0%} interval {interval.lower:+.1%} to "
        f"{interval.upper:+.1%}, limit {margin:.1%}, {prompts} prompts{samples}",
        figures=figures,
        remedy=_REMEDIES[verdict],
    )
