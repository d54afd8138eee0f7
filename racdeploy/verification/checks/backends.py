"""Backends: the bundle's artifacts for several engines answer equally well."""

from __future__ import annotations

from pydantic import Field

from racdeploy.results.schema import OpenShare
from racdeploy.results.units import format_confidence, format_points
from racdeploy.verification import gate
from racdeploy.verification.evidence import (
    ArmResult,
    Evidence,
    Outcome,
    completion_tokens,
    is_correct,
)
from racdeploy.verification.stats import paired, verdicts

_REMEDIES = {
    "pass": "",
    "fail": "give both targets number formats of similar width; "
    "if it stays, one engine computes another model",
    "inconclusive": "verify on more prompts: verify.count",
}


class Limits(gate.CheckLimits):
    """Limits on the difference of engines; each is judged by two one-sided tests.

    Args:
        margin: largest difference in accuracy, in either direction, as a fraction.
        length_ratio: largest ratio of mean thinking lengths, in either direction.
    """

    SHARES = ("margin",)
    margin: OpenShare = 0.05
    length_ratio: float = Field(1.2, gt=1)


def check(evidence: Evidence) -> Outcome:
    """Pass if every other artifact is as accurate as the main one and thinks as long."""
    if not evidence.other_artifacts:
        summary = "the bundle has an artifact for one engine"
        remedy = "build it with a second target: --more-targets TARGET"
        return Outcome("skipped", summary, remedy=remedy)

    results = [_compare(evidence, other.arm, other.backend) for other in evidence.other_artifacts]
    verdict = verdicts.worst(result.verdict for result in results)
    summary = "; ".join(result.summary for result in results)

    figures: dict[str, float | str] = {}
    for result in results:
        figures |= result.figures

    return Outcome(verdict, summary, figures, _REMEDIES[verdict])


def _compare(evidence: Evidence, arm: ArmResult, backend: str) -> Outcome:
    """Compare one other artifact with the main one; its figures begin with its engine's name."""
    main = evidence.pruned
    limits = evidence.gate.limits(Limits)
    confidence = evidence.gate.confidence

    pairs = main.count_disagreements(arm, is_correct)
    interval = paired.drop_interval(*pairs, confidence)
    ratio = main.length_ratio(arm, completion_tokens, evidence.budget_tokens, confidence)

    # Equal text is only reported: engines round differently, and one token changes the rest.
    equivalence = verdicts.judge_within(interval, -limits.margin, limits.margin)
    length_verdict = verdicts.judge_within(ratio, 1 / limits.length_ratio, limits.length_ratio)
    same_answer, same_text = _share_same(main, arm)

    figures = {
        "difference": pairs.drop,
        "difference_lower": interval.lower,
        "difference_upper": interval.upper,
        "margin": limits.margin,
        "same_answers": same_answer,
        "same_texts": same_text,
        "length_ratio": ratio.ratio,
        "length_lower": ratio.lower,
        "length_upper": ratio.upper,
        "length_limit": limits.length_ratio,
    }

    summary = (
        f"{backend} {arm.quant} against {evidence.backend} {main.quant}: "
        f"drop {format_points(pairs.drop)} points, {format_confidence(confidence)} interval "
        f"{format_points(interval.lower)} to {format_points(interval.upper)}, "
        f"limit ±{format_points(limits.margin)}; same answer to {same_answer:.1%} of the prompts, "
        f"same text to {same_text:.1%}; "
        f"length ratio {ratio.ratio:.3f}, {ratio.lower:.3f} to {ratio.upper:.3f}, "
        f"limit {limits.length_ratio:.2f} either way"
    )

    verdict = verdicts.worst([equivalence, length_verdict])
    named = {f"{backend}_{name}": value for name, value in figures.items()}

    return Outcome(verdict, summary, named)


def _share_same(main: ArmResult, arm: ArmResult) -> tuple[float, float]:
    """Return the shares of completions with the same scored answer, and with the same text."""
    answers = texts = 0
    for record, other in zip(main.records, arm.records, strict=True):
        answers += record.extracted is not None and record.extracted == other.extracted

        same_thinking = record.thinking_text == other.thinking_text
        texts += same_thinking and record.answer_text == other.answer_text

    count = len(main.records)
    return answers / count, texts / count
