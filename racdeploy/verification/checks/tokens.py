"""Tokens: the artifact's tokenizer gives the checkpoint's ids, and its end-of-sequence.

The recipe may accept a share of strings with different ids; the report shows it nevertheless.
"""

from __future__ import annotations

from racdeploy.verification.evidence import Evidence, Outcome, StopIds
from racdeploy.verification.token_comparison import TokenComparison


def check(evidence: Evidence) -> Outcome:
    """Pass if no more probes differ than accepted, and the end-of-sequence is the checkpoint's."""
    # First of all: with a wrong end-of-sequence an artifact never stops, though all strings agree.
    probes = evidence.probes
    stop = evidence.stop_ids
    if stop is not None:
        misses_first = bool(stop.known) and stop.expected[0] not in stop.known
        if misses_first or stop.actual not in stop.expected:
            return _report_wrong_stop(evidence, stop)

    if probes is None:
        summary = f"{evidence.backend} has no tokenizer: "
        summary += "its token ids come from the checkpoint's tokenizer.json"
        return Outcome("skipped", summary)

    if not probes:
        return Outcome("inconclusive", "no string was tokenized")

    counted = TokenComparison.count(probes)
    figures: dict[str, float | str] = {"strings": counted.strings, "different": counted.different}
    if not counted.different:
        return Outcome("pass", f"{len(probes)} strings, equal ids", figures)

    accepted = evidence.token_differences
    figures |= {"share": counted.share, "accepted": accepted, "example": counted.example}
    summary = str(counted)
    if accepted:
        summary += f"; {counted.share:.3%}, accepted up to {accepted:.3%}"
    if counted.share <= accepted:
        return Outcome("pass", summary, figures)

    remedy = evidence.choose(
        "name the right pre-tokenizer: export.pre_tokenizer in the recipe",
        "convert it again with the reference's tokenizer and pre-tokenizer",
    )
    return Outcome("fail", summary, figures, remedy)


def _report_wrong_stop(evidence: Evidence, stop: StopIds) -> Outcome:
    """Return the failure for an artifact whose end-of-sequence is not the checkpoint's."""
    named = "none" if stop.actual is None else f"id {stop.actual}"
    figures = {"end_of_sequence": -1 if stop.actual is None else stop.actual}
    file = evidence.choose("artifact", "candidate")
    original = evidence.choose("checkpoint", "reference")
    summary = f"the {file} names {named} as its end-of-sequence, "
    summary += f"the {original} {list(stop.expected)}"
    if stop.known:
        summary += f"; it stops at {list(stop.known)}, most answers end with {stop.expected[0]}"
    again = evidence.choose("export", "convert")
    remedy = f"{again} again: a program that reads the {file} alone "
    remedy += "would not stop, or stop too early"

    return Outcome("fail", summary, figures, remedy)
