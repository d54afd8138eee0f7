"""Thinking length: the pruned model must not think longer, and must not fail to stop."""

from __future__ import annotations

from racdeploy.report_model import CheckResult, Record, Verdict
from racdeploy.verify import Evidence, stats


def check(evidence: Evidence) -> CheckResult:
    """Pass if the interval of the length ratio is below its limit and that of unclosed thoughts below the margin.

    Where the dense model does not think, the whole completion counts.
    """
    settings = evidence.settings
    thinks = any(record.thinking_tokens for record in evidence.dense.records)
    dense, pruned = (
        [r.thinking_tokens if thinks else r.thinking_tokens + r.answer_tokens for r in arm.records]
        for arm in (evidence.dense, evidence.pruned)
    )
    budget = settings.max_thinking_tokens or settings.max_new_tokens
    ratio = stats.length_ratio(dense, pruned, budget, settings.confidence)
    pairs = [(d.state == "open", p.state == "open") for d, p in zip(*_records(evidence), strict=True)]
    more, fewer = sum(p and not d for d, p in pairs), sum(d and not p for d, p in pairs)
    verdicts = {
        stats.judge(stats.Interval(ratio.lower, ratio.upper), settings.length_limit),
        stats.non_inferiority(more, fewer, len(pairs), settings.margin, settings.confidence),
    }
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    return CheckResult(
        name="thinking",
        verdict=verdict,
        summary=(
            f"{'thinking' if thinks else 'completion'} length ratio {ratio.ratio:.3f}, {settings.confidence:.0%} "
            f"interval {ratio.lower:.3f} to {ratio.upper:.3f}, limit {settings.length_limit:g}; "
            f"unclosed {sum(d for d, _ in pairs)} → {sum(p for _, p in pairs)} of {len(pairs)}"
        ),
        figures={
            "length_ratio": ratio.ratio,
            "length_lower": ratio.lower,
            "length_upper": ratio.upper,
            "length_limit": settings.length_limit,
            "budget_tokens": budget,
            "unclosed_dense": sum(d for d, _ in pairs),
            "unclosed_pruned": sum(p for _, p in pairs),
        },
        remedy={
            "pass": "",
            "fail": "calibrate with source = 'rac', on longer traces, or lower the sparsity",
            "inconclusive": "verify on more prompts: verify.count",
        }[verdict],
    )


def _records(evidence: Evidence) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    return evidence.dense.records, evidence.pruned.records
