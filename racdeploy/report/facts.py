"""What was built and how to run it: the lines under the headline of the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy.report.recovery import describe_recovery
from racdeploy.report.structure import list_kept
from racdeploy.report.tables import number, plain, readable_bytes
from racdeploy.results.answers import ArmSummary, Record
from racdeploy.results.report import Report

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
    recipe, pruned = report.recipe, report.arm("pruned")
    method = _find(recipe, "prune", "method")
    source = _SOURCES.get(_find(recipe, "calibration", "source"), "")
    kept = list_kept(report.kept, report.structure)

    texts = {
        "Method": _join(method, source) if method else "",
        "Zeros": _describe_zeros(recipe, pruned),
        "Kept": _join(*(f"{part.share} of the {part.what}" for part in kept)),
        "Recovery": describe_recovery(report.recovery),
        "Stored as": _describe_format(recipe, pruned),
    }
    facts = [Fact(name, plain(text)) for name, text in texts.items() if text]
    return facts + _describe_file(pruned)


def write_command(bundle: str, records: Sequence[Record]) -> str:
    """Return a command that asks a bundle one of its questions; empty where there is no bundle."""
    if not bundle:
        return ""

    return shlex.join(["racdeploy", "run", plain(bundle), find_question(records)])


def find_question(records: Sequence[Record]) -> str:
    """Return a short question that the pruned model has answered right, if there is one."""
    for record in records:
        question = record.question
        is_short = len(question) <= _LONGEST_QUESTION and question == plain(question)
        if is_short and record.arm == "pruned" and record.correct:
            return question
    return _QUESTION


def _describe_zeros(recipe: Mapping[str, Any], pruned: ArmSummary | None) -> str:
    """Return the zeros that are in the file, where any were asked for."""
    pattern = _find(recipe, "prune", "pattern")
    if _find(recipe, "prune", "shares") not in ("", "{}"):
        pattern = "each linear its own"

    is_plain = pattern in ("", "unstructured")
    if is_plain and _find(recipe, "prune", "sparsity") in ("", "0", "0.0"):
        return ""
    if pruned is None or pruned.sparsity is None:
        return ""
    return _join(f"{pruned.sparsity:.1%} of the prunable weights", pattern)


def _describe_format(recipe: Mapping[str, Any], pruned: ArmSummary | None) -> str:
    quant = (pruned.quant if pruned else None) or _find(recipe, "export", "quant")
    packing = _find(recipe, "export", "packing")
    packed = f"packed as {packing}" if packing not in ("", "plain") else ""
    return _join(_find(recipe, "export", "format").upper(), quant, packed)


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


def _join(*texts: str) -> str:
    return ", ".join(filter(None, texts))
