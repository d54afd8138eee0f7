"""Accuracy: paired non-inferiority of the pruned artifact against the dense one."""

from __future__ import annotations

from pydantic import Field

from racdeploy.report.model import CheckResult
from racdeploy.verify import gate, stats
from racdeploy.verify.evidence import Evidence


class Limits(gate.Limits):
    """Accuracy.

    Args:
        margin: largest accuracy drop that passes, as a fraction.
    """

    margin: float = Field(0.05, gt=0, lt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the whole interval of the accuracy drop is below the margin."""
    margin, confidence = evidence.limits(Limits).margin, evidence.gate.confidence
    pairs = evidence.disagreements(lambda record: record.correct)
    prompts, answers = len(evidence.dense.by_prompt(bool)), len(evidence.dense.records)
    drop = (pairs.n10 - pairs.n01) / pairs.n
    interval = stats.drop_interval(*pairs, confidence)
    figures: dict[str, float | int | str] = {
        "drop": drop,
        "drop_lower": interval.lower,
        "drop_upper": interval.upper,
        "margin": margin,
        "dense_correct": sum(record.correct for record in evidence.dense.records),
        "pruned_correct": sum(record.correct for record in evidence.pruned.records),
        "prompts": prompts,
        "answers": answers,
    }
    if not figures["dense_correct"]:
        return CheckResult(
            name="accuracy",
            verdict="inconclusive",
            summary=f"the dense model answers none of {prompts} prompts right, so there is nothing to lose",
            figures=figures,
            remedy="choose a task the dense model can do: --task",
        )
    verdict = stats.judge(interval, margin)
    return CheckResult(
        name="accuracy",
        verdict=verdict,
        summary=(
            f"drop {drop:+.1%}, {confidence:.0%} interval {interval.lower:+.1%} to {interval.upper:+.1%}, "
            f"limit {margin:.1%}, {prompts} prompts"
            + (f" with {answers // prompts} samples each" if answers > prompts else "")
        ),
        figures=figures,
        remedy={
            "pass": "",
            "fail": "lower the sparsity, calibrate on more traces, or choose a wider quant",
            "inconclusive": "verify on more prompts: verify.count in the recipe, or a larger --tier",
        }[verdict],
    )
