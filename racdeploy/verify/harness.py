"""What an evaluation harness found of both models: paired by document, and judged by the gate.

Metrics that are 0 or 1 for every document are compared as right answers are, and held to the margin
of the check of the accuracy. Others have an interval and decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy.harnesses import Score
from racdeploy.results.answers import HarnessRow, HarnessRun
from racdeploy.results.checks import CheckResult
from racdeploy.results.units import points
from racdeploy.verify.checks import accuracy
from racdeploy.verify.evidence import make_result
from racdeploy.verify.gate import Gate
from racdeploy.verify.stats import means, paired, verdicts

NAME = "harness"
_ROUNDING = 1e-6
_REMEDIES = {
    "pass": "",
    "fail": "lower the sparsity, calibrate on more traces, or choose a wider quant",
    "inconclusive": "ask more documents: a larger --harness-limit, or none",
}


def compare(
    dense: Sequence[Score], pruned: Sequence[Score], confidence: float
) -> tuple[HarnessRow, ...]:
    """Return a row for every metric that both have."""
    theirs = {(score.task, score.metric): score for score in pruned}

    rows = []
    for ours in dense:
        other = theirs.get((ours.task, ours.metric))
        if other is not None:
            rows.append(_compare(ours, other, confidence))

    return tuple(rows)


def judge(run: HarnessRun, gate: Gate) -> CheckResult:
    """Hold right answers to the margin of the accuracy; without any, nothing is decided."""
    # Right answers, of which the dense model has some to lose.
    counted = [row for row in run.rows if row.lost is not None and row.larger_is_better]
    judged = [row for row in counted if row.dense > 0]
    margin = gate.limits(accuracy.Limits).margin
    figures = {}
    for row in run.rows:
        figures[f"{row.task} {row.metric} dense"] = row.dense
        figures[f"{row.task} {row.metric} pruned"] = row.pruned

    if not judged or not gate.runs("accuracy"):
        reason = "the gate does not ask for accuracy"
        if not judged:
            reason = "in none has dense right answers to lose, logged by document"
        said = f"{len(run.rows)} figures of {run.name}: {reason}"
        return make_result(NAME, "measured", said, figures)

    found = {row: verdicts.judge(_drop(row), margin) for row in judged}
    verdict = verdicts.worst(found.values())
    worst = max(judged, key=lambda row: (found[row] == verdict, -row.difference))

    drop = _drop(worst)
    summary = (
        f"{run.name}, {worst.task}, {worst.metric}: drop {points(-worst.difference)} points, "
        f"{gate.confidence:.0%} interval {points(drop.lower)} to {points(drop.upper)}, "
        f"limit {points(margin)}, {worst.documents:,} documents"
    )
    if len(judged) > 1:
        summary += f"; the worst of {len(judged)} figures"

    return make_result(NAME, verdict, summary, {"margin": margin, **figures}, _REMEDIES[verdict])


def _compare(dense: Score, pruned: Score, confidence: float) -> HarnessRow:
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
        unpaired=_refuse_pairs(dense, pruned),
    )
    if row.unpaired:
        return row

    documents = sorted(dense.samples)
    before = [dense.samples[name] for name in documents]
    after = [pruned.samples[name] for name in documents]
    if not {*before, *after} <= {0.0, 1.0}:
        if len(documents) == 1:
            return row.model_copy(update={"unpaired": "one document has no spread"})
        low, high = means.difference_interval(before, after, confidence)
        return row.model_copy(update={"lower": low, "upper": high})

    pairs = paired.paired_counts(before, after)
    drop = paired.drop_interval(*pairs, confidence)
    counted = {"lost": round(pairs.n10), "won": round(pairs.n01)}
    return row.model_copy(update={"lower": -drop.upper, "upper": -drop.lower, **counted})


def _refuse_pairs(dense: Score, pruned: Score) -> str:
    """Return why two scores cannot be compared document by document; empty where they can."""
    if not dense.samples or not pruned.samples:
        return "no figure of every document was logged"
    if set(dense.samples) != set(pruned.samples):
        return "the two models were not asked the same documents"

    for score in (dense, pruned):
        mean = math.fsum(score.samples.values()) / len(score.samples)
        if abs(mean - score.value) > _ROUNDING:
            return "it is not the mean over documents"
    return ""


def _drop(row: HarnessRow) -> verdicts.Interval:
    assert row.lower is not None
    assert row.upper is not None
    return verdicts.Interval(-row.upper, -row.lower)
