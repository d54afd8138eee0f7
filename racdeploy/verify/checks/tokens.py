"""Tokens: the artifact's tokenizer gives the checkpoint's ids on hard strings, and the same end.

A share of the strings may differ where the recipe accepts that by name; it is shown all the same.
"""

from __future__ import annotations

from racdeploy.results.checks import CheckResult
from racdeploy.verify.differences import TokenDifferences
from racdeploy.verify.evidence import Evidence, StopIds, make_result


def check(evidence: Evidence) -> CheckResult:
    """Pass if no more probes differ than accepted, and the end is one of the checkpoint's."""
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

    found = TokenDifferences.count(probes)
    figures: dict[str, float | str] = {"strings": found.strings, "different": found.different}
    if not found.different:
        return make_result("tokens", "pass", f"{len(probes)} strings, equal ids", figures)

    accepted = evidence.token_differences
    figures |= {"share": found.share, "accepted": accepted, "example": found.example}
    summary = str(found)
    if accepted:
        summary += f"; {found.share:.3%}, accepted up to {accepted:.3%}"
    if found.share <= accepted:
        return make_result("tokens", "pass", summary, figures)

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
