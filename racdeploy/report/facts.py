"""Facts under the headline of the page: method, format and file, and the command to run it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy.report.structure import list_remaining
from racdeploy.report.tables import to_single_line
from racdeploy.results.answers import AnswerRecord, ArmSummary
from racdeploy.results.report import Report

_HASH_DIGITS = 16  # shown of a hash
_MAX_QUESTION_CHARACTERS = 60  # of a question in a command
_QUESTION = "What is 12 times 34?"
_SOURCES = {
    "rac": "calibrated on its own chain of thought",
    "prompt": "calibrated on prompts alone",
}


@dataclass(frozen=True)
class Fact:
    """Fact with its name; ``copied`` is the full text for the copy button, if ``text`` is short."""

    name: str
    text: str
    copied: str = ""


def list_facts(report: Report) -> list[Fact]:
    """Return method, zeros, number format and file, if they are known."""
    recipe, pruned = report.recipe, report.find_arm("pruned")
    kept = list_remaining(report.kept_structure, report.structure)
    method = zeros = ""
    has_pattern = _find(recipe, "prune", "pattern") not in ("", "unstructured")
    if has_pattern or _find(recipe, "prune", "sparsity") not in ("", "0", "0.0"):
        method = _find(recipe, "prune", "method")
        if pruned and pruned.sparsity is not None:
            share = f"{pruned.sparsity:.1%} of the prunable weights"
            zeros = _join(share, _find(recipe, "prune", "pattern"))
    cut = f"cut by {_find(recipe, 'structure', 'criterion') or 'error'}" if kept else ""
    source = _SOURCES.get(_find(recipe, "calibration", "source"), "")
    if method == "magnitude" and not kept:
        source = ""

    quant = (pruned.quant if pruned else None) or _find(recipe, "export", "quant")
    packing = _find(recipe, "export", "packing")
    packed = f"packed as {packing}" if packing not in ("", "plain") else ""
    texts = {
        "Method": _join(method, cut, source) if method or cut else "",
        "Zeros": zeros,
        "Stored as": _join(_find(recipe, "export", "format").upper(), quant, packed),
    }

    facts = [Fact(name, to_single_line(text)) for name, text in texts.items() if text]
    return facts + _describe_file(pruned)


def write_command(bundle: str, records: Sequence[AnswerRecord]) -> str:
    """Return a command that asks a bundle one of its questions; empty without a bundle."""
    if not bundle:
        return ""

    return shlex.join(["racdeploy", "run", to_single_line(bundle), find_question(records)])


def find_question(records: Sequence[AnswerRecord]) -> str:
    """Return a short question that the pruned model answered right, or a default question."""
    for record in records:
        question = record.question
        is_short = len(question) <= _MAX_QUESTION_CHARACTERS and question == to_single_line(
            question
        )
        if is_short and record.arm == "pruned" and record.correct:
            return question
    return _QUESTION


def _describe_file(pruned: ArmSummary | None) -> list[Fact]:
    if pruned is None or not pruned.files:
        return []

    (name, sha256), *others = pruned.files.items()
    more = f" and {len(others)} more" if others else ""
    facts = [Fact("File", to_single_line(f"{name}{more}"), to_single_line(name))]
    facts.append(Fact("SHA-256", f"{sha256[:_HASH_DIGITS]}…", sha256))
    return facts


def _find(recipe: Mapping[str, Any], part: str, key: str) -> str:
    """Return a value of a recipe as text; empty if the report does not have it."""
    values = recipe.get(part)
    value = values.get(key) if isinstance(values, Mapping) else None
    return "" if value is None else str(value)


def _join(*texts: str) -> str:
    return ", ".join(filter(None, texts))
