"""Backends: the pruned model answers alike on every engine that the bundle has an artifact for."""

from __future__ import annotations

from pydantic import Field

from racdeploy.results.checks import CheckResult
from racdeploy.results.part import InnerShare
from racdeploy.results.units import points
from racdeploy.verify import gate
from racdeploy.verify.evidence import Arm, Evidence, completion_tokens, is_correct, make_result
from racdeploy.verify.stats import lengths, paired, verdicts

_REMEDIES = {
    "pass": "",
    "fail": "give both targets number formats of like width; "
    "if it stays, one engine computes another model",
    "inconclusive": "verify on more prompts: verify.count",
}


class Limits(gate.Limits):
    """Backends; both are judged by two one-sided tests, with the whole interval.

    Args:
        margin: largest difference in accuracy, either way, as a fraction.
        length_ratio: largest ratio of mean thinking lengths, either way.
    """

    SHARES = ("margin",)
    margin: InnerShare = 0.05
    length_ratio: float = Field(1.2, gt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if every further artifact is as accurate as the main one and thinks as long."""
    if not evidence.also:
        summary = "the bundle has an artifact for one engine"
        remedy = "build it with a second target: --also TARGET"
        return make_result("backends", "skipped", summary, remedy=remedy)

    found = [_compare(evidence, other.arm, other.backend) for other in evidence.also]
    verdict = verdicts.worst(result.verdict for result in found)
    summary = "; ".join(result.summary for result in found)

    figures: dict[str, float | str] = {}
    for result in found:
        figures |= result.figures

    return make_result("backends", verdict, summary, figures, _REMEDIES[verdict])


def _compare(evidence: Evidence, arm: Arm, backend: str) -> CheckResult:
    main = evidence.pruned
    limits = evidence.gate.limits(Limits)
    confidence = evidence.gate.confidence

    pairs = paired.paired_counts(main.by_prompt(is_correct), arm.by_prompt(is_correct))
    interval = paired.drop_interval(*pairs, confidence)

    main_tokens = main.by_prompt(completion_tokens)
    tokens = arm.by_prompt(completion_tokens)
    ratio = lengths.length_ratio(main_tokens, tokens, evidence.budget_tokens, confidence)

    alike = verdicts.judge_within(interval, -limits.margin, limits.margin)
    as_long = verdicts.judge_within(ratio, 1 / limits.length_ratio, limits.length_ratio)
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
        f"drop {points(pairs.drop)} points, {confidence:.0%} interval {points(interval.lower)} to "
        f"{points(interval.upper)}, limit ±{points(limits.margin)}; "
        f"same answer to {same_answer:.1%} of the prompts, same text to {same_text:.1%}; "
        f"length ratio {ratio.ratio:.3f}, {ratio.lower:.3f} to {ratio.upper:.3f}, "
        f"limit {limits.length_ratio:.2f} either way"
    )

    verdict = verdicts.worst([alike, as_long])
    named = {f"{backend}_{name}": value for name, value in figures.items()}

    return make_result("backends", verdict, summary, named)


def _share_same(main: Arm, arm: Arm) -> tuple[float, float]:
    """Return the shares of completions with the same scored answer, and with the same text."""
    answers = texts = 0
    for ours, theirs in zip(main.records, arm.records, strict=True):
        answers += ours.extracted is not None and ours.extracted == theirs.extracted

        same_thinking = ours.thinking_text == theirs.thinking_text
        texts += same_thinking and ours.answer_text == theirs.answer_text

    count = len(main.records)
    return answers / count, texts / count
