"""Tokens: the artifact's tokenizer gives the checkpoint's ids on hard strings, and the same end."""

from __future__ import annotations

from racdeploy.report.model import CheckResult
from racdeploy.verify.evidence import Evidence, StopIds, make_result


def check(evidence: Evidence) -> CheckResult:
    """Pass if every probe has equal ids and the end-of-sequence is one of the checkpoint's."""
    probes = evidence.probes
    stop = evidence.stop_ids
    if stop is not None and stop.actual not in stop.expected:
        return _report_wrong_stop(stop)

    if probes is None:
        summary = f"{evidence.backend} has no tokenizer: "
        summary += "its token ids come from the checkpoint's tokenizer.json"
        return make_result("tokens", "skipped", summary)

    if not probes:
        return make_result("tokens", "inconclusive", "no string was tokenized")

    wrong = [probe for probe in probes if probe.expected != probe.actual]
    figures = {"strings": len(probes), "different": len(wrong)}
    if not wrong:
        return make_result("tokens", "pass", f"{len(probes)} strings, equal ids", figures)

    first = wrong[0]
    summary = f"{len(wrong)} of {len(probes)} strings differ; the first is {first.text[:60]!r}: "
    summary += f"{list(first.expected[:8])} expected, {list(first.actual[:8])} found"
    remedy = "name the right pre-tokenizer: export.pre_tokenizer in the recipe"

    return make_result("tokens", "fail", summary, figures, remedy)


def _report_wrong_stop(stop: StopIds) -> CheckResult:
    named = "none" if stop.actual is None else f"id {stop.actual}"
    figures = {"end_of_sequence": -1 if stop.actual is None else stop.actual}
    summary = f"the artifact names {named} as its end-of-sequence, "
    summary += f"the checkpoint {list(stop.expected)}"
    remedy = "export again: a program that reads the artifact alone "
    remedy += "would not stop, or stop too early"

    return make_result("tokens", "fail", summary, figures, remedy)
