"""Backends: the pruned model answers alike on every engine that the bundle has an artifact for."""

from __future__ import annotations

from pydantic import Field

from racdeploy.report.model import CheckResult, Record, Verdict
from racdeploy.verify import gate, stats
from racdeploy.verify.evidence import Arm, Evidence, OtherArtifact


class Limits(gate.Limits):
    """Backends; both are judged by two one-sided tests, with the whole interval.

    Args:
        margin: largest difference in accuracy, either way, as a fraction.
        length_ratio: largest ratio of mean thinking lengths, either way.
    """

    margin: float = Field(0.05, gt=0, lt=1)
    length_ratio: float = Field(1.2, gt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if every further artifact is as accurate as the main one and thinks as long, within the limits."""
    if not evidence.also:
        return CheckResult(
            name="backends",
            verdict="skipped",
            summary="the bundle has an artifact for one engine",
            remedy="build it with a second target: --also TARGET",
        )
    found = [_compare(evidence, other) for other in evidence.also]
    verdicts = [result.verdict for result in found]
    verdict: Verdict = (
        "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    )
    return CheckResult(
        name="backends",
        verdict=verdict,
        summary="; ".join(result.summary for result in found),
        figures={key: value for result in found for key, value in result.figures.items()},
        remedy={
            "pass": "",
            "fail": "give both targets number formats of like width; if it stays, one engine computes another model",
            "inconclusive": "verify on more prompts: verify.count",
        }[verdict],
    )


def _compare(evidence: Evidence, other: OtherArtifact) -> CheckResult:
    main, arm = evidence.pruned, other.arm
    limits, confidence = evidence.limits(Limits), evidence.gate.confidence
    pairs = stats.paired_counts(main.by_prompt(_right), arm.by_prompt(_right))
    difference = stats.drop_interval(*pairs, confidence)
    budget = evidence.settings.max_thinking_tokens or evidence.settings.max_new_tokens
    lengths = [one.by_prompt(_length) for one in (main, arm)]
    ratio = stats.length_ratio(lengths[0], lengths[1], budget, confidence)
    verdicts = {
        stats.equivalence(*pairs, limits.margin, confidence),
        stats.equivalent_lengths(lengths[0], lengths[1], budget, limits.length_ratio, confidence),
    }
    verdict: Verdict = (
        "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    )
    same_answer, same_text = _same(main, arm)
    return CheckResult(
        name="backends",
        verdict=verdict,
        summary=(
            f"{other.backend} {arm.quant} against {evidence.backend} {main.quant}: drop "
            f"{(pairs.n10 - pairs.n01) / pairs.n:+.1%}, {confidence:.0%} interval {difference.lower:+.1%} to "
            f"{difference.upper:+.1%}, limit ±{limits.margin:.1%}; same answer to {same_answer:.1%} of the prompts, "
            f"same text to {same_text:.1%}; length ratio {ratio.ratio:.3f}, {ratio.lower:.3f} to {ratio.upper:.3f}, "
            f"limit {limits.length_ratio:g} either way"
        ),
        figures={
            f"{other.backend}_{key}": value
            for key, value in {
                "difference": (pairs.n10 - pairs.n01) / pairs.n,
                "difference_lower": difference.lower,
                "difference_upper": difference.upper,
                "margin": limits.margin,
                "same_answers": same_answer,
                "same_texts": same_text,
                "length_ratio": ratio.ratio,
                "length_lower": ratio.lower,
                "length_upper": ratio.upper,
                "length_limit": limits.length_ratio,
            }.items()
        },
    )


def _same(main: Arm, arm: Arm) -> tuple[float, float]:
    """Return the shares of completions with the same scored answer, and with the same text altogether."""
    pairs = list(zip(main.records, arm.records, strict=True))
    answers = sum(a.extracted is not None and a.extracted == b.extracted for a, b in pairs)
    texts = sum(
        (a.thinking_text, a.answer_text) == (b.thinking_text, b.answer_text) for a, b in pairs
    )
    return answers / len(pairs), texts / len(pairs)


def _right(record: Record) -> bool:
    return record.correct


def _length(record: Record) -> int:
    return record.thinking_tokens + record.answer_tokens
