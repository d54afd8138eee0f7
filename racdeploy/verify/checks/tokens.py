"""Tokens: the artifact's tokenizer gives the checkpoint's ids on hard strings, and the same end."""

from __future__ import annotations

from racdeploy.report.model import CheckResult
from racdeploy.verify.evidence import Evidence, StopIds


def check(evidence: Evidence) -> CheckResult:
    """Pass if every probe has equal ids and the end-of-sequence is one of the checkpoint's."""
    probes = evidence.probes
    stop = evidence.stop_ids
    if stop is not None and stop.actual not in stop.expected:
        return _report_wrong_stop(stop)
    if probes is None:
        return CheckResult(
            name="tokens",
            verdict="skipped",
            summary=f"{evidence.backend} has no tokenizer: "
            "its token ids come from the checkpoint's tokenizer.json",
        )
    if not probes:
        return CheckResult(name="tokens", verdict="inconclusive", summary="no string was tokenized")

    wrong = [probe for probe in probes if probe.expected != probe.actual]
    figures: dict[str, float | int | str] = {"strings": len(probes), "different": len(wrong)}
    if not wrong:
        summary = f"{len(probes)} strings, equal ids"
        return CheckResult(name="tokens", verdict="pass", summary=summary, figures=figures)

    first = wrong[0]
    return CheckResult(
        name="tokens",
        verdict="fail",
        summary=f"{len(wrong)} of {len(probes)} strings differ; the first is {first.text[:60]!r}: "
        f"{list(first.expected[:8])} expected, {list(first.actual[:8])} found",
        figures=figures,
        remedy="name the right pre-tokenizer: export.pre_tokenizer in the recipe",
    )


def _report_wrong_stop(stop: StopIds) -> CheckResult:
    named = "none" if stop.actual is None else f"id {stop.actual}"
    return CheckResult(
        name="tokens",
        verdict="fail",
        summary=f"the artifact names {named} as its end-of-sequence, "
        f"the checkpoint {list(stop.expected)}",
        figures={"end_of_sequence": -1 if stop.actual is None else stop.actual},
        remedy="export again: a program that reads the artifact alone "
        "would not stop, or stop too early",
    )
