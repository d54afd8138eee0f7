"""The first words of a report, for every output: a headline, and what was found in sentences."""

from __future__ import annotations

from racdeploy.report.recovery import describe_recovery
from racdeploy.report.structure import describe_kept
from racdeploy.report.tables import plain, say
from racdeploy.results.answers import Comparison
from racdeploy.results.report import Report

_EVEN = "No measurable loss: {0.drop:points} points, at most {0.drop_upper:points}"
_EVEN_BETTER = "No measurable loss: {1:points} points more, at most {0.drop_upper:points} fewer"
_UNSURE = "{1:points} points {2} right answers, which chance can explain ({3})"
_CHANGED = "{1:points} points {2} right answers ({3})"
_INTERVAL = "{0.confidence:.0%} interval of the loss {0.drop_lower:points} to {0.drop_upper:points}"
_BASIS = "margin {0.margin:points}, {0.n:,} prompts"
_LENGTH = (
    "Thinking is {1}: {0.length_ratio:ratio} times, "
    "{0.length_lower:ratio} to {0.length_upper:ratio}"
)
_LENGTH_LIMIT = " (limit {0.length_limit:.2f})"
_UNCLOSED = "Thoughts that never end: {0.unclosed:,} of {0.prompts:,}, before {1.unclosed:,}."
_WIDENED = (
    "{0} {1[prompts]:.0f} prompts can show: the margin was widened to {1[margin]:points} points "
    "from {1[margin_asked]:points}."
)


def headline(report: Report) -> str:
    """Return the verdict and what it is about, without a full stop."""
    return plain(f"{report.verdict.upper()}: {report.model} for {report.target}")


def explanation(report: Report) -> str:
    """Return what was found, and what was made of the model."""
    sentences = [findings(report)]
    if kept := describe_kept(report.kept, report.structure):
        sentences.append(f"Pruned keeps {kept}.")
    if learned := describe_recovery(report.recovery):
        sentences.append(f"Pruned {learned}.")
    return plain(" ".join(filter(None, sentences)))


def findings(report: Report) -> str:
    """Return checks that did not pass, the numbers compared, and what they cannot show."""
    sentences = [_name_causes(report)]
    if report.comparison:
        sentences += [describe_accuracy(report.comparison), describe_thinking(report.comparison)]

    dense, pruned = report.arm("dense"), report.arm("pruned")
    if dense and pruned and pruned.unclosed > dense.unclosed:
        sentences.append(say(_UNCLOSED, pruned, dense))

    accuracy = report.check("accuracy")
    if accuracy and "margin_asked" in accuracy.figures:
        passed = report.verdict == "pass"
        found = "No breakage was found, which is all that" if passed else "Breakage is what"
        sentences.append(say(_WIDENED, found, accuracy.figures))
    sentences += [describe_lost_zeros(report), describe_token_differences(report)]
    return plain(" ".join(filter(None, sentences)))


def describe_accuracy(comparison: Comparison) -> str:
    """Return what pruning did to right answers, as a sentence."""
    basis = say(_BASIS, comparison)
    if comparison.verdict == "pass" and comparison.drop_lower <= 0 <= comparison.drop_upper:
        template = _EVEN_BETTER if comparison.drop < 0 else _EVEN
        return say(f"{template} ({basis}).", comparison, abs(comparison.drop))

    more_or_fewer = "fewer" if comparison.drop >= 0 else "more"
    even = comparison.drop_lower <= 0 <= comparison.drop_upper
    template = _UNSURE if even else _CHANGED
    interval = say(_INTERVAL, comparison)
    return say(
        f"{template}.", comparison, abs(comparison.drop), more_or_fewer, f"{interval}, {basis}"
    )


def describe_thinking(comparison: Comparison) -> str:
    """Return what pruning did to the length of thoughts; empty where it was not measured."""
    if comparison.length_ratio is None:
        return ""

    how = "as long as before"
    if comparison.length_lower is not None and comparison.length_lower > 1:
        how = "longer"
    if comparison.length_upper is not None and comparison.length_upper < 1:
        how = "shorter"

    limit = say(_LENGTH_LIMIT, comparison) if comparison.length_limit else ""
    return say(f"{_LENGTH}{limit}.", comparison, how)


def describe_lost_zeros(report: Report) -> str:
    """Return what the number format left of the zeros; empty where all are in the file."""
    check, pruned = report.check("sparsity"), report.arm("pruned")
    if check is None or "sparsity_lost" not in check.figures:
        return ""

    why = f": {pruned.quant} does not keep them" if pruned and pruned.quant else ""
    left, made = check.figures["sparsity_file"], check.figures["sparsity_asked"]
    return f"The file holds {left:.1%} zeros of the {made:.1%} that were pruned{why}."


def describe_token_differences(report: Report) -> str:
    """Return how many strings the engine tokenizes differently, where that was accepted."""
    check = report.check("tokens")
    if check is None or check.verdict != "pass" or not check.figures.get("different"):
        return ""

    figures = check.figures
    counted = f"{figures['different']:,} of {figures['strings']:,} hard strings"
    return (
        f"The artifact's engine tokenizes {counted} ({figures['share']:.3%}) differently from "
        f"tokenizer.json, up to {figures['accepted']:.3%} is accepted; one is {figures['example']}."
    )


def _name_causes(report: Report) -> str:
    """Return which checks decided on a verdict that is no pass."""
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
