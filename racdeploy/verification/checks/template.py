"""Template: the chat templates of bundle and artifact give the original model's prompt ids.

Compared models must write their thoughts after the same tag, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.verification.evidence import Evidence, Outcome, PromptProbe


def check(evidence: Evidence) -> Outcome:
    """Pass if every prompt has the same ids by every template; the first difference is shown."""
    probes = [probe for probe in evidence.prompts if probe.expected]
    if not probes:
        return Outcome("inconclusive", "no prompt was rendered before")

    inside = [probe for probe in probes if probe.artifact is not None]
    wrong = [probe for probe in probes if not _is_same(probe, probe.rendered)]
    wrong_inside = [probe for probe in inside if not _is_same(probe, probe.artifact or ())]

    figures = {
        "prompts": len(probes),
        "different": len(wrong),
        "prompts_artifact": len(inside),
        "different_artifact": len(wrong_inside),
    }

    if len({*evidence.open_tags}) > 1:
        expected_tag, actual_tag = (tag or "no tag" for tag in evidence.open_tags)
        summary = f"thoughts begin with {expected_tag} in the reference, with {actual_tag} in the "
        summary += f"candidate; {len(wrong)} of {len(probes)} prompts differ"
        remedy = "convert again with the reference's tokenizer and chat template"
        return Outcome("fail", summary, figures, remedy)

    if not wrong and not wrong_inside:
        where = ", by the artifact's own template too" if inside else ""
        summary = f"{len(probes)} prompts, equal ids{where}"
        return Outcome("pass", summary, figures)

    where = "" if wrong else " by the artifact's own template"
    first, *others = wrong or wrong_inside
    ids = first.rendered if wrong else first.artifact or ()

    summary = f"{len(others) + 1} of {len(probes)} prompts differ{where}; the first is "
    summary += f"{first.question[:60]!r}: {_describe_difference(first.expected, ids)}"
    remedy = evidence.choose(
        "put the model's own chat template back: chat_template in tokenizer_config.json, or export "
        "again",
        "write the reference's chat template into it, as gguf-new-metadata does, or convert again",
    )

    return Outcome("fail", summary, figures, remedy)


def _is_same(probe: PromptProbe, ids: Sequence[int]) -> bool:
    """Compare with the expected ids, with or without a leading beginning-of-sequence."""
    with_bos = (*probe.bos_ids, *probe.expected)
    return tuple(ids) in (probe.expected, with_bos)


def _describe_difference(expected_ids: Sequence[int], actual_ids: Sequence[int]) -> str:
    """Return a few ids from the first different one on: a whole prompt would hide it."""
    index = 0
    for expected_id, actual_id in zip(expected_ids, actual_ids, strict=False):
        if expected_id != actual_id:
            break
        index += 1

    expected = list(expected_ids[index : index + 6]) or "the end"
    actual = list(actual_ids[index : index + 6]) or "the end"
    return f"at token {index}, {expected} expected, {actual} found"
