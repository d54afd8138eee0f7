"""Template: prompts are rendered to the ids that the model was trained on, in the bundle and in the artifact itself.

When a bundle is built, the ids are compared with transformers' ``apply_chat_template``; later with those recorded then.
Programs that read the artifact alone, as llama.cpp's server and Ollama do, render the template inside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.report.model import CheckResult
from racdeploy.verify.evidence import Evidence, PromptProbe


def check(evidence: Evidence) -> CheckResult:
    """Pass if every prompt has equal ids everywhere; the first that differs is shown."""
    probes = [probe for probe in evidence.prompts if probe.expected]
    if not probes:
        return CheckResult(
            name="template", verdict="inconclusive", summary="no prompt was rendered before"
        )
    inside = [probe for probe in probes if probe.artifact is not None]
    wrong = [probe for probe in probes if not _same(probe, probe.rendered)]
    wrong_inside = [probe for probe in inside if not _same(probe, probe.artifact or ())]
    figures: dict[str, float | int | str] = {
        "prompts": len(probes),
        "different": len(wrong),
        "prompts_artifact": len(inside),
        "different_artifact": len(wrong_inside),
    }
    if not wrong and not wrong_inside:
        where = ", by the artifact's own template too" if inside else ""
        return CheckResult(
            name="template",
            verdict="pass",
            summary=f"{len(probes)} prompts, equal ids{where}",
            figures=figures,
        )
    first, ids, place = (
        (wrong[0], wrong[0].rendered, "")
        if wrong
        else (wrong_inside[0], wrong_inside[0].artifact or (), " by the artifact's own template")
    )
    return CheckResult(
        name="template",
        verdict="fail",
        summary=(
            f"{len(wrong) or len(wrong_inside)} of {len(probes)} prompts differ{place}; the first is "
            f"{first.question[:60]!r}: {_difference(first.expected, ids)}"
        ),
        figures=figures,
        remedy="put the model's own chat template back: chat_template in tokenizer_config.json, or export again",
    )


def _same(probe: PromptProbe, ids: Sequence[int]) -> bool:
    """Compare; a beginning-of-sequence that the tokenizer demands may stand in front."""
    return tuple(ids) in (probe.expected, (*probe.lead, *probe.expected))


def _difference(expected: Sequence[int], ids: Sequence[int]) -> str:
    """Say where two lists part, with the ids from there on."""
    place = next(
        (i for i, pair in enumerate(zip(expected, ids, strict=False)) if pair[0] != pair[1]), None
    )
    if place is None:
        place = min(len(expected), len(ids))
    left, right = (list(part[place : place + 6]) or "the end" for part in (expected, ids))
    return f"at token {place}, {left} expected, {right} found"
