"""Accuracy: paired non-inferiority of the pruned artifact against the dense one."""

from __future__ import annotations

from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence, stats


def check(evidence: Evidence) -> CheckResult:
    """Pass if the whole interval of the accuracy drop is below the margin."""
    settings = evidence.settings
    pairs = list(zip(evidence.dense.records, evidence.pruned.records, strict=True))
    dense_only = sum(d.correct and not p.correct for d, p in pairs)
    pruned_only = sum(p.correct and not d.correct for d, p in pairs)
    if not any(d.correct for d, _ in pairs):
        return CheckResult(
            name="accuracy",
            verdict="inconclusive",
            summary=f"the dense model answers none of {len(pairs)} prompts right, so there is nothing to lose",
            remedy="choose a task the dense model can do: --task",
        )
    interval = stats.drop_interval(dense_only, pruned_only, len(pairs), settings.confidence)
    verdict = stats.non_inferiority(dense_only, pruned_only, len(pairs), settings.margin, settings.confidence)
    drop = (dense_only - pruned_only) / len(pairs)
    return CheckResult(
        name="accuracy",
        verdict=verdict,
        summary=(
            f"drop {drop:+.1%}, {settings.confidence:.0%} interval {interval.lower:+.1%} to {interval.upper:+.1%}, "
            f"limit {settings.margin:.1%}, {len(pairs)} prompts"
        ),
        figures={
            "drop": drop,
            "drop_lower": interval.lower,
            "drop_upper": interval.upper,
            "margin": settings.margin,
            "dense_only": dense_only,
            "pruned_only": pruned_only,
            "prompts": len(pairs),
        },
        remedy={
            "pass": "",
            "fail": "lower the sparsity, calibrate on more traces, or choose a wider quant",
            "inconclusive": "verify on more prompts: verify.count",
        }[verdict],
    )
