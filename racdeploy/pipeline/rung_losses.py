"""Judgement of a rung: what it measurably loses, by the recipe's limits."""

from __future__ import annotations

from racdeploy.pipeline.divergence_stage import MeanDivergence
from racdeploy.recipe import LadderLimits
from racdeploy.results.report import Report
from racdeploy.results.units import format_points


def find_losses(
    limits: LadderLimits, divergence: MeanDivergence | None = None, report: Report | None = None
) -> list[str]:
    """Return what is measurably worse than dense in a rung; empty if nothing is.

    Args:
        divergence: of its pruned model, measured before the export; None judges without it.
        report: verification of its artifact; None judges without it.
    """
    losses = []
    if divergence is not None:
        losses += _find_divergences(limits, divergence)
    if report is not None:
        losses += [f"{check.name} failed" for check in report.checks if check.verdict == "fail"]
        losses += _find_worse_answers(limits, report)
    return losses


def _find_divergences(limits: LadderLimits, divergence: MeanDivergence) -> list[str]:
    losses = []
    if divergence.traces > limits.max_kl_traces:
        losses.append(f"a KL of {divergence.traces:.2g} on traces")
    if divergence.text > limits.max_kl_text:
        losses.append(f"a KL of {divergence.text:.2g} on text")
    return losses


def _find_worse_answers(limits: LadderLimits, report: Report) -> list[str]:
    """Return the losses whose upper bounds are above the limits."""
    compared = report.comparison
    if compared is None or compared.n < limits.min_prompts:
        return []

    losses = []
    if compared.drop_upper > limits.max_accuracy_drop:
        losses.append(f"a loss of up to {format_points(compared.drop_upper)} points")
    if compared.length_upper and compared.length_upper > limits.max_length_ratio:
        losses.append(f"thinking up to {compared.length_upper:.3f} times as long")
    return losses
