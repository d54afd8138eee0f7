"""Template: bundle and artifact render prompts to the ids that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.results.checks import CheckResult
from racdeploy.verify.evidence import Evidence, PromptProbe, make_result


def check(evidence: Evidence) -> CheckResult:
    """Pass if every prompt has equal ids everywhere; the first that differs is shown."""
    probes = [probe for probe in evidence.prompts if probe.expected]
    if not probes:
        return make_result("template", "inconclusive", "no prompt was rendered before")

    inside = [probe for probe in probes if probe.artifact is not None]
    wrong = [probe for probe in probes if not _is_same(probe, probe.rendered)]
    wrong_inside = [probe for probe in inside if not _is_same(probe, probe.artifact or ())]

    figures = {
        "prompts": len(probes),
        "different": len(wrong),
        "prompts_artifact": len(inside),
        "different_artifact": len(wrong_inside),
    }

    if not wrong and not wrong_inside:
        where = ", by the artifact's own template too" if inside else ""
        summary = f"{len(probes)} prompts, equal ids{where}"
        return make_result("template", "pass", summary, figures)

    where = "" if wrong else " by the artifact's own template"
    first, *others = wrong or wrong_inside
    ids = first.rendered if wrong else first.artifact or ()

    # Where the two lists part, with the ids from there on.
    alike = [wanted == found for wanted, found in zip(first.expected, ids, strict=False)]
    place = [*alike, False].index(False)
    wanted = list(first.expected[place : place + 6]) or "the end"
    found = list(ids[place : place + 6]) or "the end"

    summary = f"{len(others) + 1} of {len(probes)} prompts differ{where}; the first is "
    summary += f"{first.question[:60]!r}: at token {place}, {wanted} expected, {found} found"
    remedy = "put the model's own chat template back: "
    remedy += "chat_template in tokenizer_config.json, or export again"

    return make_result("template", "fail", summary, figures, remedy)


def _is_same(probe: PromptProbe, ids: Sequence[int]) -> bool:
    """Compare; a beginning-of-sequence that the tokenizer demands may precede."""
    with_lead = (*probe.lead, *probe.expected)
    return tuple(ids) in (probe.expected, with_lead)
