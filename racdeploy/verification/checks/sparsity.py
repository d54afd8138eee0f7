"""Sparsity: zeros counted in the exported file itself, after dequantization."""

from __future__ import annotations

from pydantic import Field

from racdeploy import quant
from racdeploy.verification import gate
from racdeploy.verification.evidence import Evidence, Outcome


class Limits(gate.CheckLimits):
    """Limit on missing zeros.

    Args:
        tolerance: largest difference by which the share of zeros may miss the requested one.
    """

    tolerance: float = Field(0.001, ge=0, lt=1)


def check(evidence: Evidence) -> Outcome:
    """Pass if the file holds the zeros that pruning made; skip if its quant cannot keep them."""
    rows = [row for row in evidence.tensors if row.name in evidence.prunable]
    actual = evidence.pruned.sparsity
    if not rows or actual is None:
        return Outcome("inconclusive", "no prunable tensor was measured")

    requested = evidence.requested_sparsity
    figures = {
        "sparsity_file": actual,
        "requested_sparsity": requested,
        "tensors": len(rows),
        "kept_dense": len(evidence.dense_linears),
    }

    text = f"{actual:.1%} zeros in the file, {requested:.1%} asked"

    is_reached = actual >= requested - evidence.gate.limits(Limits).tolerance
    if is_reached:
        return Outcome("pass", text, figures)

    # Not an export error: a format without an exact zero stores zeros as small weights.
    quants = {row.actual_quant for row in rows}
    if requested and not all(quant.load(name).preserves_zero for name in quants):
        return _report_lost_zeros(evidence, text, figures)

    remedy = "the export lost zeros: build again, and report it if it stays"
    return Outcome("fail", text, figures, remedy)


def _report_lost_zeros(evidence: Evidence, text: str, figures: dict[str, float]) -> Outcome:
    """Return the result for a quant that rounds zeros away: only a sparse packing fails."""
    text += f"; {evidence.pruned.quant} does not keep zeros"
    figures["sparsity_lost"] = max(0.0, evidence.requested_sparsity - figures["sparsity_file"])
    if evidence.packing == "plain":
        known = "q8_0, q6_k, q5_0, q4_0, q3_k, mxfp4 or a sparse preset"
        remedy = f"choose a quant that keeps zeros: {known}"
        return Outcome("skipped", text, figures, remedy)

    text += f", and packing {evidence.packing} stores them as zeros"
    remedy = "choose a quant that keeps zeros, or packing = 'plain'"
    return Outcome("fail", text, figures, remedy)
