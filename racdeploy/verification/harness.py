"""Scores of an evaluation harness for both models, paired by document and judged by the gate.

Metrics that are 0 or 1 for every document are compared like right answers, and have to keep the
margin of the accuracy check. Other metrics get an interval and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy.harnesses import HarnessScore
from racdeploy.results.answers import HarnessRow, HarnessRun
from racdeploy.results.checks import CheckResult
from racdeploy.results.units import format_points
from racdeploy.verification.checks import accuracy
from racdeploy.verification.evidence import make_check_result
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats import means, paired, verdicts

NAME = "harness"
_ROUNDING = 1e-6
_REMEDIES = {
    "pass": "",
    "fail": "lower the sparsity, calibrate on more traces, or choose a wider quant",
    "inconclusive": "ask more documents: a larger --harness-limit, or none",
}


def compare(
    dense: Sequence[HarnessScore], pruned: Sequence[HarnessScore], confidence: float
) -> tuple[HarnessRow, ...]:
    """Return a row for every metric that both models have."""
    pruned_scores = {(score.task, score.metric): score for score in pruned}

    rows = []
    for dense_score in dense:
        pruned_score = pruned_scores.get((dense_score.task, dense_score.metric))
        if pruned_score is not None:
            rows.append(_compare(dense_score, pruned_score, confidence))

    return tuple(rows)


def judge(run: HarnessRun, gate: Gate) -> CheckResult:
    """Judge right answers by the accuracy margin; without any, nothing is decided.

    The verdict is that of the worst metric.
    """
    # A metric on which the dense model has no right answer has nothing to lose: it cannot fail.
    counted = [row for row in run.rows if row.lost is not None and row.larger_is_better]
    judged = [row for row in counted if row.dense > 0]
    margin = gate.limits(accuracy.Limits).margin
    figures = {}
    for row in run.rows:
        figures[f"{row.task} {row.metric} dense"] = row.dense
        figures[f"{row.task} {row.metric} pruned"] = row.pruned

    if not judged or not gate.is_enabled("accuracy"):
        reason = "the gate does not ask for accuracy"
        if not judged:
            reason = "none of them has right answers of the dense model, logged by document"
        summary = f"{len(run.rows)} figures of {run.name}: {reason}"
        return make_check_result(NAME, "measured", summary, figures)

    row_verdicts = {row: verdicts.judge(_drop(row), margin) for row in judged}
    verdict = verdicts.worst(row_verdicts.values())
    worst = max(judged, key=lambda row: (row_verdicts[row] == verdict, -row.difference))

    drop = _drop(worst)
    summary = (
        f"{run.name}, {worst.task}, {worst.metric}: "
        f"drop {format_points(-worst.difference)} points, {gate.confidence:.0%} interval "
        f"{format_points(drop.lower)} to {format_points(drop.upper)}, "
        f"limit {format_points(margin)}, {worst.documents:,} documents"
    )
    if len(judged) > 1:
        summary += f"; the worst of {len(judged)} figures"

    return make_check_result(
        NAME, verdict, summary, {"margin": margin, **figures}, _REMEDIES[verdict]
    )


def _compare(dense: HarnessScore, pruned: HarnessScore, confidence: float) -> HarnessRow:
    """Return a metric of both models, with the interval of its difference where it is paired."""
    row = HarnessRow(
        task=dense.task,
        metric=dense.metric,
        documents=min(dense.documents, pruned.documents),
        dense=dense.value,
        pruned=pruned.value,
        difference=pruned.value - dense.value,
        dense_stderr=dense.stderr,
        pruned_stderr=pruned.stderr,
        larger_is_better=dense.larger_is_better,
        unpaired_reason=_refuse_pairs(dense, pruned),
    )
    if row.unpaired_reason:
        return row

    # 0 and 1 only: the exact paired interval; else Student's interval of the mean difference.
    documents = sorted(dense.by_document)
    before = [dense.by_document[name] for name in documents]
    after = [pruned.by_document[name] for name in documents]
    if not {*before, *after} <= {0.0, 1.0}:
        if len(documents) == 1:
            return row.model_copy(update={"unpaired_reason": "one document has no spread"})
        low, high = means.difference_interval(before, after, confidence)
        return row.model_copy(update={"lower": low, "upper": high})

    pairs = paired.paired_counts(before, after)
    drop = paired.drop_interval(*pairs, confidence)
    counted = {"lost": round(pairs.n10), "won": round(pairs.n01)}
    return row.model_copy(update={"lower": -drop.upper, "upper": -drop.lower, **counted})


def _refuse_pairs(dense: HarnessScore, pruned: HarnessScore) -> str:
    """Return the reason why two scores cannot be paired by document; empty if they can."""
    if not dense.by_document or not pruned.by_document:
        return "no figure of every document was logged"
    if set(dense.by_document) != set(pruned.by_document):
        return "the two models were not asked the same documents"

    # A corpus metric such as BLEU is not the mean over documents: pairing them would mislead.
    for score in (dense, pruned):
        mean = math.fsum(score.by_document.values()) / len(score.by_document)
        if abs(mean - score.value) > _ROUNDING:
            return "it is not the mean over documents"
    return ""


def _drop(row: HarnessRow) -> verdicts.ConfidenceInterval:
    """Return the interval of the drop: the row's difference with the sign turned."""
    assert row.lower is not None
    assert row.upper is not None
    return verdicts.ConfidenceInterval(-row.upper, -row.lower)
