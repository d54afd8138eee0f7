"""What was built and how to run it: the lines under the headline of the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy.report.model import ArmSummary, Record, Report
from racdeploy.report.recovery import describe_recovery
from racdeploy.report.structure import list_kept
from racdeploy.report.tables import number, plain, readable_bytes

_SHORT = 16  # digits of a hash that a reader compares
_LONGEST_QUESTION = 60  # characters of a question that is copied into a command
_QUESTION = "What is 12 times 34?"
_SOURCES = {
    "rac": "calibrated on its own chain of thought",
    "prompt": "calibrated on prompts alone",
}


@dataclass(frozen=True)
class Fact:
    """A name and what there is to say; ``copied`` is the whole of what is shown in short."""

    name: str
    text: str
    copied: str = ""


def list_facts(report: Report) -> list[Fact]:
    """Return method, zeros, cut, number format and file, as far as the report knows them."""
    arms = {arm.name: arm for arm in report.arms}
    pruned = arms.get("pruned")

    facts = [
        _describe_method(report.recipe),
        _describe_zeros(report.recipe, pruned),
        _describe_cut(report),
        Fact("Recovery", describe_recovery(report.recovery)),
        _describe_format(report.recipe, pruned),
        *_describe_file(pruned),
    ]
    return [fact for fact in facts if fact.text]


def write_command(bundle: str, records: Sequence[Record]) -> str:
    """Return a command that asks a bundle one of its questions; empty where there is no bundle."""
    if not bundle:
        return ""

    return shlex.join(["racdeploy", "run", plain(bundle), find_question(records)])


def find_question(records: Sequence[Record]) -> str:
    """Return a short question that the pruned model has answered right, if there is one."""
    for record in records:
        if record.arm == "pruned" and record.correct and _is_short(record.question):
            return record.question
    return _QUESTION


def _is_short(question: str) -> bool:
    return len(question) <= _LONGEST_QUESTION and question == plain(question)


def _describe_method(recipe: Mapping[str, Any]) -> Fact:
    method = _find(recipe, "prune", "method")
    source = _SOURCES.get(_find(recipe, "calibration", "source"), "")
    return Fact("Method", plain(", ".join(filter(None, (method, source)))) if method else "")


def _describe_zeros(recipe: Mapping[str, Any], pruned: ArmSummary | None) -> Fact:
    """Return the zeros that are in the file, where any were asked for."""
    asked = _find(recipe, "prune", "sparsity") not in ("", "0", "0.0")
    pattern = _find(recipe, "prune", "pattern")
    if _find(recipe, "prune", "shares") not in ("", "{}"):
        pattern = "each linear its own"
    patterned = pattern not in ("", "unstructured")
    if pruned is None or pruned.sparsity is None or not (asked or patterned):
        return Fact("Zeros", "")

    share = f"{pruned.sparsity:.1%} of the prunable weights"
    return Fact("Zeros", plain(", ".join(filter(None, (share, pattern)))))


def _describe_cut(report: Report) -> Fact:
    kept = list_kept(report.kept, report.structure)
    return Fact("Kept", ", ".join(f"{part.share} of the {part.what}" for part in kept))


def _describe_format(recipe: Mapping[str, Any], pruned: ArmSummary | None) -> Fact:
    form = _find(recipe, "export", "format").upper()
    quant = (pruned.quant if pruned else None) or _find(recipe, "export", "quant")
    packing = _find(recipe, "export", "packing")
    packed = f"packed as {packing}" if packing not in ("", "plain") else ""
    return Fact("Stored as", plain(", ".join(filter(None, (form, quant, packed)))))


def _describe_file(pruned: ArmSummary | None) -> list[Fact]:
    if pruned is None or not pruned.files:
        return []

    (name, sha256), *others = pruned.files.items()
    beside = f" and {len(others)} beside it" if others else ""
    facts = [Fact("File", plain(f"{name}{beside}"), plain(name))]
    facts.append(Fact("SHA-256", f"{sha256[:_SHORT]}…", sha256))

    if pruned.size_bytes:
        size = f"{readable_bytes(pruned.size_bytes)} ({number(pruned.size_bytes)} bytes)"
        facts.append(Fact("Size", size))
    return facts


def _find(recipe: Mapping[str, Any], part: str, key: str) -> str:
    """Return a value of a recipe as text; empty where this report does not have it."""
    values = recipe.get(part)
    found = values.get(key) if isinstance(values, Mapping) else None
    return "" if found is None else str(found)
