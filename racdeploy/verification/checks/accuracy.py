"""Accuracy: paired non-inferiority of the pruned artifact against the dense one."""

from __future__ import annotations

from racdeploy.results.schema import OpenShare
from racdeploy.results.units import format_confidence, format_points
from racdeploy.verification import gate
from racdeploy.verification.evidence import Evidence, Outcome, is_correct
from racdeploy.verification.stats import paired, verdicts

LOST = (
    "lower the sparsity, calibrate on more traces, or choose a wider quant",
    "choose a wider number format; if it loses as much, a tensor is wrong: convert again; "
    "--reports shows the lost prompts",
)


class Limits(gate.CheckLimits):
    """Limits on accuracy.

    Args:
        margin: largest accuracy drop that passes, as a fraction.
    """

    SHARES = ("margin",)
    margin: OpenShare = 0.05


def check(evidence: Evidence) -> Outcome:
    """Pass if the whole interval of the accuracy drop is below the margin."""
    margin = evidence.gate.limits(Limits).margin
    dense_correct = evidence.dense.count(is_correct)
    prompts = evidence.prompt_count
    answers = len(evidence.dense.records)
    pairs = evidence.dense.count_disagreements(evidence.pruned, is_correct)
    interval = paired.drop_interval(*pairs, evidence.gate.confidence)
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

    # No drop can be seen from 0: such a comparison would pass any model.
    if not dense_correct:
        nothing = f"the {evidence.roles[0]} model answers none of {prompts} prompts right"
        summary = f"{nothing}, so there is nothing to lose"
        remedy = f"choose a task the {evidence.roles[0]} model can do: --tasks"
        return Outcome("inconclusive", summary, figures, remedy)

    requested = evidence.gate.original.limits(Limits).margin
    if requested != margin:
        figures["requested_margin"] = requested

    verdict = verdicts.judge(interval, margin)
    summary = f"{describe_drop(pairs.drop, interval, evidence.gate)}, {prompts:,} prompts"
    if answers > prompts:
        summary += f" with {answers // prompts} samples each"

    remedy = evidence.choose(*LOST) if verdict == "fail" else ""
    if verdict == "inconclusive":
        discordant_rate = max(pairs.n10 + pairs.n01, 1) / pairs.n
        enough = paired.find_min_prompts(discordant_rate, margin, evidence.gate.confidence)
        more = max(enough or 0, 2 * prompts)
        remedy = evidence.choose(
            f"build it with --prompts {more}, or verify with a larger --tier",
            f"--prompts {more}",
        )
    return Outcome(verdict, summary, figures, remedy)


def describe_drop(drop: float, interval: verdicts.ConfidenceInterval, limits: gate.Gate) -> str:
    """Return a drop of right answers with its interval and its limit, in points."""
    lower, upper, margin = map(format_points, (*interval, limits.limits(Limits).margin))
    confidence = format_confidence(limits.confidence)
    return (
        f"drop {format_points(drop)} points, {confidence} interval {lower} to {upper}, "
        f"limit {margin}"
    )
