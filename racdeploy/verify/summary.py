"""Condense evidence and check results into the report that everything prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from racdeploy.export import ExportResult
from racdeploy.report.model import (
    ArmSummary,
    BlockRow,
    CheckResult,
    Comparison,
    LinearRow,
    Report,
    RivalRow,
    TaskRow,
    TensorRow,
)
from racdeploy.verify import stats
from racdeploy.verify.checks import accuracy as accuracy_check
from racdeploy.verify.checks import thinking as thinking_check
from racdeploy.verify.evidence import Arm, Evidence


def summarize(
    evidence: Evidence,
    checks: Sequence[CheckResult],
    *,
    linears: Sequence[LinearRow],
    blocks: Sequence[BlockRow],
    model: str,
    target: str,
    recipe: Mapping[str, Any],
    notes: Sequence[str],
    fingerprint: Mapping[str, Any],
    created: datetime,
) -> Report:
    """Return the report of one verification.

    Args:
        evidence: what was measured.
        checks: what the checks decided.
        linears: how each linear was pruned.
        blocks: how far each block drifted.
        model: what the user named.
        target: deployment target.
        recipe: the resolved recipe.
        notes: sentences for the reader.
        fingerprint: versions and settings the numbers depend on.
        created: when the verification ended.
    """
    return Report(
        created=created,
        model=model,
        target=target,
        recipe=dict(recipe),
        arms=tuple(
            map(
                summarize_arm,
                (
                    evidence.dense,
                    evidence.pruned,
                    *(other.arm for other in evidence.also),
                    *evidence.rivals,
                ),
            )
        ),
        tasks=_tasks(evidence),
        comparison=_comparison(evidence, {check.name: check for check in checks}),
        rivals=_rivals(evidence),
        checks=tuple(checks),
        linears=tuple(linears),
        blocks=tuple(blocks),
        positions=evidence.logits.along if evidence.logits else (),
        tensors=evidence.tensors,
        notes=tuple(notes),
        fingerprint=dict(fingerprint),
    )


def summarize_arm(arm: Arm) -> ArmSummary:
    """Return counts, means and the 95 % Wilson interval of one arm."""
    count, correct = len(arm.records), sum(record.correct for record in arm.records)
    interval = stats.wilson_interval(correct, count)
    decode_s = arm.stats.get("decode_s", 0.0)
    peak_rss_bytes = arm.stats.get("peak_rss_bytes")
    return ArmSummary(
        name=arm.name,
        prompts=count,
        correct=correct,
        accuracy=correct / count,
        accuracy_lower=interval.lower,
        accuracy_upper=interval.upper,
        thinking_tokens_mean=sum(r.thinking_tokens for r in arm.records) / count,
        answer_tokens_mean=sum(r.answer_tokens for r in arm.records) / count,
        unclosed=sum(r.state == "open" for r in arm.records),
        forced=sum(r.state == "forced" for r in arm.records),
        loops=sum(r.loop_tokens > 0 for r in arm.records),
        cut=sum(r.finish_reason == "length" and r.state != "open" for r in arm.records),
        size_bytes=arm.size_bytes,
        tokens_per_s=arm.stats.get("generated_tokens", 0.0) / decode_s if decode_s else None,
        load_ms=arm.stats.get("load_ms"),
        peak_rss_bytes=int(peak_rss_bytes) if peak_rss_bytes is not None else None,
        quant=arm.quant,
        sparsity=arm.sparsity,
        files=dict(arm.files),
        kernels=arm.kernels or None,
    )


def _tasks(evidence: Evidence) -> tuple[TaskRow, ...]:
    rows = []
    for task in dict.fromkeys(record.task for record in evidence.dense.records):
        dense = [record.correct for record in evidence.dense.records if record.task == task]
        pruned = [record.correct for record in evidence.pruned.records if record.task == task]
        rows.append(
            TaskRow(
                task=task, prompts=len(dense), dense_correct=sum(dense), pruned_correct=sum(pruned)
            )
        )
    return tuple(rows)


def _comparison(evidence: Evidence, checks: Mapping[str, CheckResult]) -> Comparison:
    """Return the comparison; its numbers are those on which the checks decided."""
    pairs = list(zip(evidence.dense.records, evidence.pruned.records, strict=True))
    counted = evidence.disagreements(lambda record: record.correct)
    dense_only = sum(d.correct and not p.correct for d, p in pairs)
    pruned_only = sum(p.correct and not d.correct for d, p in pairs)
    accuracy, thinking = checks["accuracy"], checks["thinking"].figures
    interval = stats.drop_interval(*counted, evidence.gate.confidence)
    length_verdict = checks["thinking"].verdict
    return Comparison(
        drop=(counted.n10 - counted.n01) / counted.n,
        drop_lower=interval.lower,
        drop_upper=interval.upper,
        verdict="inconclusive" if accuracy.verdict == "skipped" else accuracy.verdict,
        margin=evidence.limits(accuracy_check.Limits).margin,
        n10=dense_only,
        n01=pruned_only,
        n=len(evidence.dense.by_prompt(bool)),
        length_ratio=_number(thinking, "length_ratio"),
        length_lower=_number(thinking, "length_lower"),
        length_upper=_number(thinking, "length_upper"),
        length_verdict=None if length_verdict == "skipped" else length_verdict,
        length_limit=evidence.limits(thinking_check.Limits).length_ratio,
        length_budget_tokens=evidence.settings.max_thinking_tokens
        or evidence.settings.max_new_tokens,
        confidence=evidence.gate.confidence,
    )


def _rivals(evidence: Evidence) -> tuple[RivalRow, ...]:
    """Return the dense models against the pruned one, the one of the comparison too; none where it is the only one."""
    if not evidence.rivals:
        return ()
    confidence = evidence.gate.confidence
    budget = evidence.settings.max_thinking_tokens or evidence.settings.max_new_tokens
    right, lengths = (
        [arm.by_prompt(value) for arm in (evidence.pruned, evidence.dense, *evidence.rivals)]
        for value in (lambda record: record.correct, lambda record: record.thinking_tokens)
    )
    rows = []
    for place, arm in enumerate((evidence.dense, *evidence.rivals), 1):
        pairs = stats.paired_counts(right[place], right[0])
        interval = stats.drop_interval(*pairs, confidence)
        length = stats.length_ratio(lengths[0], lengths[place], budget, confidence)
        rows.append(
            RivalRow(
                name=arm.name,
                gain=(pairs.n10 - pairs.n01) / pairs.n,
                gain_lower=interval.lower,
                gain_upper=interval.upper,
                length_ratio=length.ratio,
                length_lower=length.lower,
                length_upper=length.upper,
            )
        )
    return tuple(rows)


def _number(figures: Mapping[str, float | int | str], name: str) -> float | None:
    return float(figures[name]) if name in figures else None


def tensor_rows(exported: ExportResult) -> tuple[TensorRow, ...]:
    """Return the report's rows of an exported file."""
    return tuple(
        TensorRow(
            name=t.name,
            quant_asked=t.quant_asked,
            quant_real=t.quant_real,
            zeros=t.zeros,
            size_bytes=t.size_bytes,
            bits=8 * t.size_bytes / math.prod(t.shape),
            reason=t.reason,
            packing=t.packing,
            packing_reason=t.packing_reason,
        )
        for t in exported.tensors
    )
