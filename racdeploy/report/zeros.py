"""Zeros that pruning made and a number format did not keep, as the sparsity check counted them."""

from __future__ import annotations

from racdeploy.report.model import Report


def describe_lost_zeros(report: Report) -> str:
    """Return what is left in the file, one sentence; empty where all zeros are in it."""
    checks = {check.name: check for check in report.checks}
    found = checks.get("sparsity")
    if found is None or "sparsity_lost" not in found.figures:
        return ""

    arms = {arm.name: arm for arm in report.arms}
    quant = arms["pruned"].quant if "pruned" in arms else None
    why = f": {quant} does not keep them" if quant else ""

    left = found.figures["sparsity_file"]
    made = found.figures["sparsity_asked"]
    return f"The file holds {left:.1%} zeros of the {made:.1%} that were pruned{why}."
