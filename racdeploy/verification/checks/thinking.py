"""Thinking: the pruned model must not think much longer, loop, or fail to stop."""

from __future__ import annotations

from pydantic import PositiveFloat

from racdeploy.results.schema import OpenShare
from racdeploy.results.units import format_confidence
from racdeploy.verification import gate
from racdeploy.verification.evidence import (
    FAULTS,
    Evidence,
    Outcome,
    completion_tokens,
    thinking_tokens,
)
from racdeploy.verification.stats import paired, verdicts

_REMEDIES = {
    "pass": ("", ""),
    "fail": (
        "calibrate with source = 'rac', on longer traces, or lower the sparsity",
        "choose a wider number format, or serve it with a thinking budget",
    ),
    "inconclusive": (
        "verify on more prompts: verify.count in the recipe, or a larger --tier",
        "ask more --prompts",
    ),
}


class Limits(gate.CheckLimits):
    """Limits on thinking; each share is judged like the accuracy drop, with its whole interval.

    Args:
        length_ratio: largest ratio of restricted mean thinking lengths, pruned to dense, that
            passes.
        unclosed: largest share of prompts that may lose the end of their thinking.
        loops: largest share of prompts that may begin to repeat themselves.
        forced: largest share of prompts whose thinking may newly be closed by the budget.
        truncated: largest share of prompts whose answer may newly reach the token limit.
    """

    SHARES = ("unclosed", "loops", "forced", "truncated")
    length_ratio: PositiveFloat = 1.2
    unclosed: OpenShare = 0.05
    loops: OpenShare = 0.05
    forced: OpenShare = 0.05
    truncated: OpenShare = 0.05


def check(evidence: Evidence) -> Outcome:
    """Pass if the length ratio and every fault keep their limits.

    Whole completions are measured if the dense model does not think at all.
    """
    limits = evidence.gate.limits(Limits)
    confidence = evidence.gate.confidence
    dense, pruned = evidence.dense, evidence.pruned
    thinks = any(map(thinking_tokens, dense.records))
    length = thinking_tokens if thinks else completion_tokens

    ratio = dense.length_ratio(pruned, length, evidence.budget_tokens, confidence)
    results = {"length": verdicts.judge(ratio, limits.length_ratio)}

    figures: dict[str, float | str] = {
        "length_ratio": ratio.ratio,
        "length_lower": ratio.lower,
        "length_upper": ratio.upper,
        "length_limit": limits.length_ratio,
        "budget_tokens": evidence.budget_tokens,
    }

    counts = []
    for fault, has_fault in FAULTS.items():
        limit: float = getattr(limits, fault)

        # Counted as answers, a fault that only the pruned arm has would be a gain: swap the arms.
        fewer, more, prompts = dense.count_disagreements(pruned, has_fault)
        interval = paired.drop_interval(more, fewer, prompts, confidence)
        results[fault] = verdicts.judge(interval, limit)

        before = dense.count(has_fault)
        after = pruned.count(has_fault)
        figures[f"{fault}_dense"] = before
        figures[f"{fault}_pruned"] = after
        figures[f"{fault}_limit"] = limit
        counts.append(f"{fault} {before} → {after}")

    verdict = verdicts.worst(results.values())
    causes = [name for name, result in results.items() if result == verdict]
    because = "" if verdict == "pass" else f"{', '.join(causes)}: "

    summary = (
        f"{because}{'thinking' if thinks else 'completion'} length ratio {ratio.ratio:.3f}, "
        f"{format_confidence(confidence)} interval {ratio.lower:.3f} to {ratio.upper:.3f}, "
        f"limit {limits.length_ratio:.2f}; {', '.join(counts)} of {len(dense.records):,}"
    )

    return Outcome(verdict, summary, figures, evidence.choose(*_REMEDIES[verdict]))
