"""Run the checks over the evidence, and build the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from racdeploy.results.answers import AnswerRecord, ArmSummary, Comparison, RivalRow, TaskRow
from racdeploy.results.checks import CheckResult
from racdeploy.results.report import Report
from racdeploy.tasks import find_protocol
from racdeploy.verification import harness
from racdeploy.verification.checks import accuracy, thinking
from racdeploy.verification.evidence import (
    FAULTS,
    ArmResult,
    Evidence,
    is_correct,
    run_checks,
    thinking_tokens,
)
from racdeploy.verification.stats import paired


def build_report(
    evidence: Evidence, notes: Sequence[str], **about: Any
) -> tuple[Report, list[AnswerRecord]]:
    """Run the checks; return the report and the records of all arms.

    Args:
        notes: sentences for the reader of the report.
        about: other fields of the report: model, target, recipe, machine, pruning.
    """
    checks = run_checks(evidence)
    if evidence.harness:
        checks.append(harness.judge(evidence.harness, evidence.gate).to_result("harness"))

    also = [other.arm for other in evidence.other_artifacts]
    arms = (evidence.dense, evidence.pruned, *also, *evidence.rivals)

    report = Report(
        created=datetime.now(UTC),
        arms=tuple(map(_summarize_arm, arms)),
        tasks=_count_by_task(evidence),
        comparison=_compare_arms(evidence, {check.name: check for check in checks}),
        rivals=_compare_rivals(evidence),
        checks=tuple(checks),
        tensors=evidence.tensors,
        harness=evidence.harness,
        notes=tuple(notes),
        **about,
    )

    in_order = (evidence.dense, evidence.pruned, *evidence.rivals, *also)
    return report, list(chain.from_iterable(arm.records for arm in in_order))


def _summarize_arm(arm: ArmResult) -> ArmSummary:
    """Return counts, means and the 95 % Wilson interval of one arm."""
    count = len(arm.records)
    correct = arm.count(is_correct)
    interval = paired.wilson_interval(correct, count)
    peak_rss_bytes = arm.stats.get("peak_rss_bytes")

    return ArmSummary(
        name=arm.name,
        prompts=count,
        correct=correct,
        accuracy=correct / count,
        accuracy_lower=interval.lower,
        accuracy_upper=interval.upper,
        thinking_tokens_mean=sum(map(thinking_tokens, arm.records)) / count,
        answer_tokens_mean=sum(record.answer_tokens for record in arm.records) / count,
        size_bytes=arm.size_bytes,
        tokens_per_s=arm.tokens_per_s,
        load_ms=arm.stats.get("load_ms"),
        peak_rss_bytes=None if peak_rss_bytes is None else int(peak_rss_bytes),
        quant=arm.quant or None,
        sparsity=arm.sparsity,
        files=dict(arm.files),
        kernels=arm.kernels or None,
        **{fault: arm.count(has_fault) for fault, has_fault in FAULTS.items()},
    )


def _count_by_task(evidence: Evidence) -> tuple[TaskRow, ...]:
    """Return the correct answers of both arms on each task."""
    prompt_counts = Counter(record.task for record in evidence.dense.records)
    dense = Counter(record.task for record in evidence.dense.records if record.correct)
    pruned = Counter(record.task for record in evidence.pruned.records if record.correct)

    return tuple(
        TaskRow(
            task=task,
            protocol=find_protocol(task),
            prompts=prompts,
            dense_correct=dense[task],
            pruned_correct=pruned[task],
        )
        for task, prompts in prompt_counts.items()
    )


def _compare_arms(evidence: Evidence, checks: Mapping[str, CheckResult]) -> Comparison:
    """Return the comparison, with the numbers that the checks decided on."""
    records = zip(evidence.dense.records, evidence.pruned.records, strict=True)
    outcomes = Counter((dense.correct, pruned.correct) for dense, pruned in records)

    # The interval needs prompts, corrected for several samples; n10 and n01 below count answers.
    pairs = evidence.dense.count_disagreements(evidence.pruned, is_correct)
    interval = paired.drop_interval(*pairs, evidence.gate.confidence)

    verdict = checks["accuracy"].verdict
    figures = checks["thinking"].figures
    names = ("length_ratio", "length_lower", "length_upper")
    length = {name: float(figures[name]) for name in names if name in figures}

    return Comparison(
        drop=pairs.drop,
        drop_lower=interval.lower,
        drop_upper=interval.upper,
        verdict="inconclusive" if verdict == "skipped" else verdict,
        margin=evidence.gate.limits(accuracy.Limits).margin,
        n10=outcomes[True, False],
        n01=outcomes[False, True],
        n=evidence.prompt_count,
        length_limit=evidence.gate.limits(thinking.Limits).length_ratio,
        length_budget_tokens=evidence.budget_tokens,
        confidence=evidence.gate.confidence,
        planned=evidence.planned or None,
        **length,
    )


def _compare_rivals(evidence: Evidence) -> tuple[RivalRow, ...]:
    """Return the dense models, each compared with the pruned one; empty without a rival."""
    if not evidence.rivals:
        return ()

    confidence = evidence.gate.confidence
    pruned = evidence.pruned

    # The rival comes first: a "drop" from rival to pruned is the rival's gain.
    rows = []
    for arm in (evidence.dense, *evidence.rivals):
        pairs = arm.count_disagreements(pruned, is_correct)
        gain = paired.drop_interval(*pairs, confidence)
        length = pruned.length_ratio(arm, thinking_tokens, evidence.budget_tokens, confidence)
        rows.append(
            RivalRow(
                name=arm.name,
                gain=pairs.drop,
                gain_lower=gain.lower,
                gain_upper=gain.upper,
                length_ratio=length.ratio,
                length_lower=length.lower,
                length_upper=length.upper,
            )
        )

    return tuple(rows)
