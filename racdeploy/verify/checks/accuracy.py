"""Accuracy: paired non-inferiority of the pruned artifact against the dense one."""

from __future__ import annotations

from racdeploy.results.checks import CheckResult
from racdeploy.results.part import InnerShare
from racdeploy.results.units import points
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence, is_correct, make_result
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

    SHARES = ("margin",)
    margin: InnerShare = 0.05


def check(evidence: Evidence) -> CheckResult:
    """Pass if the whole interval of the accuracy drop is below the margin."""
    margin = evidence.gate.limits(Limits).margin
    confidence = evidence.gate.confidence
    dense_correct = evidence.dense.count(is_correct)
    prompts = evidence.prompt_count
    answers = len(evidence.dense.records)
    pairs = evidence.disagreements(is_correct)
    interval = paired.drop_interval(*pairs, confidence)
    figures = {
        "drop": pairs.drop,
        "drop_lower": interval.lower,
        "drop_upper": interval.upper,
        "margin": margin,
        "dense_correct": dense_correct,
        "pruned_correct": evidence.pruned.count(is_correct),
        "prompts": prompts,
        "answers": answers,
    }

    if not dense_correct:
        nothing = f"the dense model answers none of {prompts} prompts right"
        summary = f"{nothing}, so there is nothing to lose"
        remedy = "choose a task the dense model can do: --task"
        return make_result("accuracy", "inconclusive", summary, figures, remedy)

    asked = evidence.gate.asked.limits(Limits).margin
    if asked != margin:
        figures["margin_asked"] = asked

    verdict = verdicts.judge(interval, margin)
    summary = (
        f"drop {points(pairs.drop)} points, {confidence:.0%} interval {points(interval.lower)} to "
        f"{points(interval.upper)}, limit {points(margin)}, {prompts:,} prompts"
    )
    if answers > prompts:
        summary += f" with {answers // prompts} samples each"

    return make_result("accuracy", verdict, summary, figures, _REMEDIES[verdict])
