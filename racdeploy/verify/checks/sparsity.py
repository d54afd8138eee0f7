"""Sparsity: zeros in the exported file itself, dequantized and counted."""

from __future__ import annotations

from pydantic import Field

from racdeploy import plugins
from racdeploy.report.model import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence


class Limits(gate.Limits):
    """Zeros in the file.

    Args:
        tolerance: how far the share of zeros may be below what was asked.
    """

    tolerance: float = Field(0.001, ge=0, lt=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the file holds the zeros that pruning made, or its quant is known to lose them."""
    rows = [row for row in evidence.tensors if row.name in evidence.prunable]
    if not rows:
        return CheckResult(
            name="sparsity", verdict="inconclusive", summary="no prunable tensor was measured"
        )
    found = evidence.pruned.sparsity
    figures: dict[str, float | int | str] = {
        "sparsity_file": found,
        "sparsity_asked": evidence.sparsity_asked,
        "tensors": len(rows),
        "kept_dense": len(evidence.dense_linears),
    }
    quant = evidence.pruned.quant
    keeps = all(
        plugins.load("quant", name).PRESERVES_ZERO for name in {row.quant_real for row in rows}
    )
    text = f"{found:.1%} zeros in the file, {evidence.sparsity_asked:.1%} asked"
    if evidence.sparsity_recipe is not None:
        figures["sparsity_recipe"] = evidence.sparsity_recipe
        text += (
            f" by the last step that was kept, not the {evidence.sparsity_recipe:.1%} of the recipe"
        )
    if not keeps and evidence.packing != "plain":
        return CheckResult(
            name="sparsity",
            verdict="fail",
            summary=f"{text}; {quant} does not keep zeros, and packing {evidence.packing} stores them as zeros",
            figures=figures,
            remedy="choose a quant that keeps zeros, or packing = 'plain'",
        )
    if not keeps:
        return CheckResult(
            name="sparsity",
            verdict="skipped",
            summary=f"{text}; {quant} does not keep zeros",
            figures=figures,
            remedy="choose a quant that keeps zeros: q8_0, q6_k, q5_0, q4_0, q3_k, mxfp4 or a sparse preset",
        )
    reached = found >= evidence.sparsity_asked - evidence.limits(Limits).tolerance
    return CheckResult(
        name="sparsity",
        verdict="pass" if reached else "fail",
        summary=text,
        figures=figures,
        remedy="" if reached else "the export lost zeros: build again, and report it if it stays",
    )
