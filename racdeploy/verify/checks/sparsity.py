"""Sparsity: zeros in the exported file itself, dequantized and counted."""

from __future__ import annotations

from pydantic import Field

from racdeploy import plugins
from racdeploy.results.checks import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence, make_result


class Limits(gate.Limits):
    """Zeros in the file.

    Args:
        tolerance: how far the share of zeros may be below what was asked.
    """

    tolerance: float = Field(0.001, ge=0, lt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the file holds the zeros that pruning made, or its quant is known to lose them."""
    rows = [row for row in evidence.tensors if row.name in evidence.prunable]
    found = evidence.pruned.sparsity
    if not rows or found is None:
        return make_result("sparsity", "inconclusive", "no prunable tensor was measured")

    asked = evidence.sparsity_asked
    figures = {
        "sparsity_file": found,
        "sparsity_asked": asked,
        "tensors": len(rows),
        "kept_dense": len(evidence.dense_linears),
    }

    text = f"{found:.1%} zeros in the file, {asked:.1%} asked"

    reached = found >= asked - evidence.gate.limits(Limits).tolerance
    if reached:
        return make_result("sparsity", "pass", text, figures)

    quants = {row.quant_real for row in rows}
    if asked and not all(plugins.load("quant", name).PRESERVES_ZERO for name in quants):
        return _report_lost_zeros(evidence, text, figures)

    remedy = "the export lost zeros: build again, and report it if it stays"
    return make_result("sparsity", "fail", text, figures, remedy)


def _report_lost_zeros(evidence: Evidence, text: str, figures: dict[str, float]) -> CheckResult:
    text += f"; {evidence.pruned.quant} does not keep zeros"
    figures["sparsity_lost"] = max(0.0, evidence.sparsity_asked - figures["sparsity_file"])
    if evidence.packing == "plain":
        known = "q8_0, q6_k, q5_0, q4_0, q3_k, mxfp4 or a sparse preset"
        remedy = f"choose a quant that keeps zeros: {known}"
        return make_result("sparsity", "skipped", text, figures, remedy)

    text += f", and packing {evidence.packing} stores them as zeros"
    remedy = "choose a quant that keeps zeros, or packing = 'plain'"
    return make_result("sparsity", "fail", text, figures, remedy)
