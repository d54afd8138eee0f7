"""Headline and explanation of a report, in sentences for every output."""

from __future__ import annotations

from racdeploy.report.pareto import describe_front
from racdeploy.report.tables import format_with_units, to_single_line
from racdeploy.results.answers import ArmSummary, Comparison
from racdeploy.results.checks import JUDGED_BY_INTERVALS, is_clear
from racdeploy.results.report import Report

_NO_LOSS = "No measurable loss: {0.drop:points} points, at most {0.drop_upper:points}"
_NO_LOSS_BETTER = "No measurable loss: {1:points} points more, at most {0.drop_upper:points} fewer"
_UNSURE = "{1:points} points {2} right answers, not significant ({3})"
_SAME = "As many right answers, but too few prompts to show that nothing was lost ({3})"
_CHANGED = "{1:points} points {2} right answers ({3})"
_INTERVAL = (
    "{0.confidence:confidence} interval of the loss {0.drop_lower:points} to {0.drop_upper:points}"
)
_BASIS = "margin {0.margin:points}, {0.n:,} prompts"
_LENGTH = (
    "Thinking is {1}: {0.length_ratio:ratio} times, "
    "{0.length_lower:ratio} to {0.length_upper:ratio}"
)
_LENGTH_LIMIT = " (limit {0.length_limit:.2f})"
_STOPPED = (
    "{1} after {0.n:,} of {0.planned:,} prompts: the intervals are those of this analysis "
    "({0.confidence:confidence})."
)
_UNCLOSED = "Thoughts that never end: {0.unclosed:,} of {0.prompts:,}, {2} {1.unclosed:,}."
_WIDENED = (
    "{0} {1[prompts]:.0f} prompts can show: the margin was widened to {1[margin]:points} points "
    "from {1[requested_margin]:points}."
)


def write_headline(report: Report) -> str:
    """Return the verdict with model, target, size and failed rungs, without a full stop."""
    widened = " with a widened margin" if is_widened(report) else ""
    whose = f"against {report.reference}" if report.reference else f"for {report.target}"
    line = f"{report.verdict.upper()}{widened}: {report.model} {whose}"
    pruned = report.find_arm("pruned")
    # Each file once: a dense model whose thinking is controlled is the same file.
    dense_by_quant: dict[str | None, ArmSummary] = {}
    for arm in report.arms:
        if arm.name.startswith("dense") and arm.size_bytes:
            dense_by_quant.setdefault(arm.quant, arm)
    ratios = [
        f"{pruned.size_bytes / arm.size_bytes:.2f} of {_name_with_quant(arm, report)}"
        for arm in dense_by_quant.values()
        if pruned and pruned.size_bytes and arm.size_bytes
    ]
    if ratios:
        line += f", bytes {', '.join(ratios)}"
    if report.stepped_back:
        line += f", stepped back from {', '.join(report.stepped_back)}"
    return to_single_line(line)


def is_widened(report: Report) -> bool:
    """Return whether the report passes, but not with the margin that was asked for."""
    accuracy = report.find_check("accuracy")
    return report.verdict == "pass" and "requested_margin" in (accuracy.figures if accuracy else ())


def write_findings(report: Report) -> str:
    """Return the checks that did not pass, the compared figures, and their limitations."""
    sentences = [_name_causes(report)]
    if report.comparison:
        sentences += [describe_accuracy(report.comparison), describe_thinking(report.comparison)]
        sentences.append(describe_stop(report))

    dense, pruned = report.find_arm("dense"), report.find_arm("pruned")
    if dense and pruned and pruned.unclosed > dense.unclosed:
        sentences.append(format_with_units(_UNCLOSED, pruned, dense, report.roles[0]))

    accuracy = report.find_check("accuracy")
    if accuracy and "requested_margin" in accuracy.figures:
        passed = report.verdict == "pass"
        finding = "No breakage was found, which is all that" if passed else "Breakage is what"
        sentences.append(format_with_units(_WIDENED, finding, accuracy.figures))
    sentences += [describe_lost_zeros(report), describe_token_differences(report)]
    sentences.append(describe_front(report))
    return to_single_line(" ".join(filter(None, sentences)))


def _name_with_quant(arm: ArmSummary, report: Report) -> str:
    """Return the arm's name with its number format, as ``dense q8_0``."""
    if report.reference:
        return "it"
    is_named = not arm.quant or arm.quant.lower() in arm.name.lower()
    return arm.name if is_named else f"{arm.name} {arm.quant}"


def describe_accuracy(comparison: Comparison) -> str:
    """Return a sentence on the change of accuracy; "no loss" only if the margin is kept."""
    basis = format_with_units(_BASIS, comparison)
    if comparison.verdict == "pass" and comparison.drop_lower <= 0 <= comparison.drop_upper:
        template = _NO_LOSS_BETTER if comparison.drop < 0 else _NO_LOSS
        return format_with_units(f"{template} ({basis}).", comparison, abs(comparison.drop))

    more_or_fewer = "fewer" if comparison.drop >= 0 else "more"
    is_equal = comparison.drop_lower <= 0 <= comparison.drop_upper
    template = _UNSURE if is_equal else _CHANGED
    if not round(comparison.drop, 3):
        template = _SAME
    interval = format_with_units(_INTERVAL, comparison)
    values = (comparison, abs(comparison.drop), more_or_fewer, f"{interval}, {basis}")
    return format_with_units(f"{template}.", *values)


def describe_thinking(comparison: Comparison) -> str:
    """Return a sentence on the change of thinking lengths; empty if they were not measured."""
    if comparison.length_ratio is None:
        return ""

    change = "equally long"
    if comparison.length_lower is not None and comparison.length_lower > 1:
        change = "longer"
    if comparison.length_upper is not None and comparison.length_upper < 1:
        change = "shorter"

    limit = format_with_units(_LENGTH_LIMIT, comparison) if comparison.length_limit else ""
    return format_with_units(f"{_LENGTH}{limit}.", comparison, change)


def describe_stop(report: Report) -> str:
    """Return a sentence on when the questions ended; empty if all were asked at once."""
    comparison = report.comparison
    if comparison is None or comparison.planned is None:
        return ""

    verdicts = [check.verdict for check in report.checks if check.name in JUDGED_BY_INTERVALS]
    return format_with_units(_STOPPED, comparison, "Clear" if is_clear(verdicts) else "Not clear")


def describe_lost_zeros(report: Report) -> str:
    """Return a sentence on zeros that the number format lost; empty if all are in the file."""
    check, pruned = report.find_check("sparsity"), report.find_arm("pruned")
    if check is None or "sparsity_lost" not in check.figures:
        return ""

    reason = f": {pruned.quant} does not keep them" if pruned and pruned.quant else ""
    stored, pruned_share = check.figures["sparsity_file"], check.figures["requested_sparsity"]
    return f"The file holds {stored:.1%} zeros of the {pruned_share:.1%} that were pruned{reason}."


def describe_token_differences(report: Report) -> str:
    """Return a sentence on strings with different token ids, if the recipe accepted them."""
    check = report.find_check("tokens")
    if check is None or check.verdict != "pass" or not check.figures.get("different"):
        return ""

    figures = check.figures
    counted = f"{figures['different']:,} of {figures['strings']:,} hard strings"
    return (
        f"The artifact's engine tokenizes {counted} ({figures['share']:.3%}) differently from "
        f"tokenizer.json, up to {figures['accepted']:.3%} is accepted; one is {figures['example']}."
    )


def _name_causes(report: Report) -> str:
    """Return the checks that prevented a pass, or the reason why none decided."""
    if report.verdict == "pass":
        return ""

    named = [check.name for check in report.checks if check.verdict == report.verdict]
    if named:
        verb = "Failed" if report.verdict == "fail" else "Inconclusive"
        return f"{verb}: {', '.join(named)}."

    cause = "No check ran"
    if report.checks:
        cause = "No check had a limit to decide by"
    if report.checks and all(check.verdict == "skipped" for check in report.checks):
        cause = "Every check was skipped"
    return f"{cause}, and missing data never passes."
