"""Scores of an evaluation harness for both models, paired by document and judged by the gate.

Metrics that are 0 or 1 for every document are compared like right answers, and have to keep the
margin of the accuracy check. Other metrics get an interval and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy.files.reading import Json
from racdeploy.harnesses import HarnessScore
from racdeploy.results.answers import HarnessRow, HarnessRun
from racdeploy.verification.checks import accuracy
from racdeploy.verification.evidence import Outcome
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats import means, paired, verdicts

_ROUNDING = 1e-6
_MORE = "ask more documents: a larger --harness-limit, or none"


def compare(
    dense: Sequence[HarnessScore], pruned: Sequence[HarnessScore], confidence: float
) -> tuple[HarnessRow, ...]:
    """Return a row for every metric that both models have."""
    after = {(score.task, score.metric): score for score in pruned}
    pairs = [(score, after.get((score.task, score.metric))) for score in dense]
    return tuple(_compare(score, other, confidence) for score, other in pairs if other)


def judge(run: HarnessRun, gate: Gate) -> Outcome:
    """Judge right answers by the accuracy margin; without any, nothing is decided.

    The verdict is that of the worst metric.
    """
    arms = ("dense", "pruned")
    figures = {
        f"{row.task} {row.metric} {arm}": getattr(row, arm) for row in run.rows for arm in arms
    }

    # A metric on which the dense model has no right answer has nothing to lose: it cannot fail.
    drops = {
        row: verdicts.ConfidenceInterval(-row.upper, -row.lower)
        for row in run.rows
        if row.upper is not None and row.lower is not None and row.lost is not None
        if row.larger_is_better and row.dense > 0
    }
    if not drops or not gate.is_enabled("accuracy"):
        reason = "the gate does not ask for accuracy"
        if not drops:
            reason = "none of them has right answers of the dense model, logged by document"
        summary = f"{len(run.rows)} figures of {run.name}: {reason}"
        return Outcome("measured", summary, figures)

    margin = gate.limits(accuracy.Limits).margin
    row_verdicts = {row: verdicts.judge(drop, margin) for row, drop in drops.items()}
    verdict = verdicts.worst(row_verdicts.values())
    worst = max(drops, key=lambda row: (row_verdicts[row] == verdict, -row.difference))

    drop = accuracy.describe_drop(-worst.difference, drops[worst], gate)
    summary = f"{run.name}, {worst.task}, {worst.metric}: {drop}, {worst.documents:,} documents"
    if len(drops) > 1:
        summary += f"; the worst of {len(drops)} figures"

    remedy = {"fail": accuracy.LOST[0], "inconclusive": _MORE}.get(verdict, "")
    return Outcome(verdict, summary, {"margin": margin, **figures}, remedy)


def _compare(dense: HarnessScore, pruned: HarnessScore, confidence: float) -> HarnessRow:
    """Return a metric of both models, with the interval of its difference where it is paired."""
    reason, result = _refuse_pairs(dense, pruned), Json()
    if not reason:
        documents = sorted(dense.by_document)
        before = [dense.by_document[name] for name in documents]
        after = [pruned.by_document[name] for name in documents]

        # 0 and 1 only: the exact paired interval; else Student's interval of the mean difference.
        result = means.difference_interval(before, after, confidence)._asdict()
        if {*before, *after} <= {0.0, 1.0}:
            pairs = paired.paired_counts(before, after)
            drop = paired.drop_interval(*pairs, confidence)
            result = {"lower": -drop.upper, "upper": -drop.lower}
            result |= {"lost": round(pairs.n10), "won": round(pairs.n01)}

    return HarnessRow(
        task=dense.task,
        metric=dense.metric,
        documents=min(dense.documents, pruned.documents),
        dense=dense.value,
        pruned=pruned.value,
        difference=pruned.value - dense.value,
        dense_stderr=dense.stderr,
        pruned_stderr=pruned.stderr,
        larger_is_better=dense.larger_is_better,
        unpaired_reason=reason,
        **result,
    )


def _refuse_pairs(dense: HarnessScore, pruned: HarnessScore) -> str:
    """Return the reason why two scores cannot be paired by document; empty if they can."""
    if not dense.by_document or not pruned.by_document:
        return "no figure of every document was logged"
    if set(dense.by_document) != set(pruned.by_document):
        return "the two models were not asked the same documents"
    if len(dense.by_document) == 1:
        return "one document has no spread"

    # A corpus metric such as BLEU is not the mean over documents: pairing them would mislead.
    for score in (dense, pruned):
        mean = math.fsum(score.by_document.values()) / len(score.by_document)
        if abs(mean - score.value) > _ROUNDING:
            return "it is not the mean over documents"
    return ""
