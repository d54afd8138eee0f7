"""Token parity: the artifact's tokenizer gives the ids of the checkpoint's tokenizer, on hard strings."""

from __future__ import annotations

from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence


def check(evidence: Evidence) -> CheckResult:
    """Pass if every probe string has equal ids; the first that differs is named."""
    probes = evidence.probes
    if probes is None:
        return CheckResult(
            name="tokens",
            verdict="skipped",
            summary=f"{evidence.backend} has no tokenizer: its token ids come from the checkpoint's tokenizer.json",
        )
    if not probes:
        return CheckResult(name="tokens", verdict="inconclusive", summary="no string was tokenized")
    wrong = [probe for probe in probes if probe.expected != probe.actual]
    figures: dict[str, float | int | str] = {"strings": len(probes), "different": len(wrong)}
    if not wrong:
        return CheckResult(name="tokens", verdict="pass", summary=f"{len(probes)} strings, equal ids", figures=figures)
    first = wrong[0]
    return CheckResult(
        name="tokens",
        verdict="fail",
        summary=(
            f"{len(wrong)} of {len(probes)} strings differ; the first is {first.text[:60]!r}: "
            f"{list(first.expected[:8])} expected, {list(first.actual[:8])} found"
        ),
        figures=figures,
        remedy="name the right pre-tokenizer: export.pre_tokenizer in the recipe",
    )
