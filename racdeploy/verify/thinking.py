"""Thinking length: the pruned model must not think longer, and must not fail to stop."""

from __future__ import annotations

from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence, stats


def check(evidence: Evidence) -> CheckResult:
    """Pass if the interval of the length ratio is below the limit and unclosed thoughts are not more."""
    settings = evidence.settings
    dense = [record.thinking_tokens for record in evidence.dense.records]
    pruned = [record.thinking_tokens for record in evidence.pruned.records]
    if not any(dense):
        return CheckResult(
            name="thinking",
            verdict="skipped",
            summary="the dense model does not think on these prompts",
        )
    budget = settings.max_thinking_tokens or settings.max_new_tokens
    ratio = stats.length_ratio(dense, pruned, budget, settings.confidence)
    unclosed = [sum(r.state == "open" for r in arm.records) for arm in (evidence.dense, evidence.pruned)]
    more_unclosed = (unclosed[1] - unclosed[0]) / len(pruned)
    if ratio.lower > settings.length_limit or more_unclosed > settings.margin:
        verdict = "fail"
    elif ratio.upper <= settings.length_limit:
        verdict = "pass"
    else:
        verdict = "inconclusive"
    return CheckResult(
        name="thinking",
        verdict=verdict,
        summary=(
            f"length ratio {ratio.ratio:.3f}, {settings.confidence:.0%} interval {ratio.lower:.3f} to "
            f"{ratio.upper:.3f}, limit {settings.length_limit:g}; unclosed {unclosed[0]} → {unclosed[1]}"
        ),
        figures={
            "length_ratio": ratio.ratio,
            "length_lower": ratio.lower,
            "length_upper": ratio.upper,
            "length_limit": settings.length_limit,
            "budget_tokens": budget,
            "unclosed_dense": unclosed[0],
            "unclosed_pruned": unclosed[1],
        },
        remedy={
            "pass": "",
            "fail": "calibrate with source = 'rac', on longer traces, or lower the sparsity",
            "inconclusive": "verify on more prompts: verify.count",
        }[verdict],
    )
