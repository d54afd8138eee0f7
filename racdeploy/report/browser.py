"""The prompts of a run as data for the page's script, and the first of them for readers without it.

A page stays below 6 MB: texts are cut, and where there are many prompts those on which the models
agree come without their thoughts. What is missing is counted, and is in records.jsonl.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from racdeploy.files.unprintable import visible
from racdeploy.report.pairs import OUTCOMES, Pair
from racdeploy.results.answers import Record

FIRST = 10
"""Prompts that are on the page without a script."""
_TEXT_BYTES, _BRIEF_BYTES = 3_500_000, 1_500_000
_TEXT_CHARACTERS, _FIRST_CHARACTERS, _BRIEF_CHARACTERS = 24_000, 4_000, 200
# What a script element cannot hold, and what old readers of JSON take for a line end.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Prompts:
    """The prompts of a page.

    Args:
        data: JSON for the script, safe inside an element.
        counts: prompts of each outcome, of all that there are.
        first: the first disagreements.
        brief: prompts whose thoughts are left out; ``missing`` ones are left out whole.
    """

    data: Markup
    counts: Mapping[str, int]
    first: Sequence[Pair]
    brief: int
    missing: int


def list_prompts(pairs: Sequence[Pair]) -> Prompts:
    """Return what fits on a page, prompts on which the models disagree first."""
    in_order = sorted(pairs, key=lambda pair: OUTCOMES.index(pair.outcome))
    entries: list[str] = []
    brief = 0
    left_bytes, left_brief_bytes = _TEXT_BYTES, _BRIEF_BYTES

    for pair in in_order:
        if left_bytes > 0:
            entry = _write(_describe(pair, _TEXT_CHARACTERS, thoughts=True))
            left_bytes -= len(entry.encode())
        else:
            entry = _write(_describe(pair, _BRIEF_CHARACTERS, thoughts=False))
            left_brief_bytes -= len(entry.encode())
            if left_brief_bytes < 0:
                break
            brief += 1
        entries.append(entry)

    return Prompts(
        data=Markup(f"[{','.join(entries)}]"),
        counts=Counter(pair.outcome for pair in pairs),
        first=[pair for pair in in_order if pair.outcome in ("lost", "won")][:FIRST],
        brief=brief,
        missing=len(pairs) - len(entries),
    )


def cut(text: str, most: int = _FIRST_CHARACTERS) -> str:
    """Return visible text up to a length, and how much more there is."""
    text = visible(text)
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]}\n… {more:,} more characters in records.jsonl"


def count_shared(pair: Pair, most: int = _FIRST_CHARACTERS) -> int:
    """Return the characters with which both thoughts begin, up to the end of a word."""
    dense = cut(pair.dense.thinking_text, most)
    pruned = cut(pair.pruned.thinking_text, most)
    if dense == pruned:
        return len(dense)

    length = min(len(dense), len(pruned))
    differing = (place for place in range(length) if dense[place] != pruned[place])
    prefix = dense[: next(differing, length)]
    return max(prefix.rfind(" "), prefix.rfind("\n")) + 1


def _describe(pair: Pair, most: int, thoughts: bool) -> dict[str, Any]:
    """Return one prompt as the script reads it."""
    shared = 0
    if thoughts:
        # The script counts in units of UTF-16.
        prefix = cut(pair.dense.thinking_text, most)[: count_shared(pair, most)]
        shared = len(prefix.encode("utf-16-le")) // 2

    return {
        "prompt": pair.dense.prompt,
        "sample": pair.dense.sample,
        "task": cut(pair.dense.task, _BRIEF_CHARACTERS),
        "outcome": pair.outcome,
        "question": cut(pair.dense.question, most),
        "gold": cut(pair.dense.gold, most),
        "shared": shared,
        "dense": _describe_side(pair.dense, most, thoughts),
        "pruned": _describe_side(pair.pruned, most, thoughts),
    }


def _describe_side(record: Record, most: int, thoughts: bool) -> dict[str, Any]:
    """Return one answer; without thoughts it has figures and what was scored alone."""
    found = record.extracted
    side = {
        "tokens": record.thinking_tokens,
        "answered": record.answer_tokens,
        "state": record.state,
        "end": record.finish_reason,
        "loop": record.loop_tokens,
        "right": record.correct,
        "found": None if found is None else cut(found, _BRIEF_CHARACTERS),
    }

    if thoughts:
        side["thinking"] = cut(record.thinking_text, most)
        side["answer"] = cut(record.answer_text, most)
    return side


def _write(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_ESCAPES)
