"""Prompts of a run as data for the page's script, and a few of them for readers without scripts.

A page stays below 6 MB: texts are truncated, and if there are many prompts, those on which the
models agree come without their thoughts. The page counts what is missing; records.jsonl has it all.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from markupsafe import Markup

from racdeploy.files.unprintable import replace_unprintable
from racdeploy.report.pairs import OUTCOMES, AnswerPair
from racdeploy.results.answers import AnswerRecord

MAX_STATIC_PROMPTS = 10
"""Maximum number of prompts that are shown without a script."""
_TEXT_BYTES, _BRIEF_BYTES = 3_500_000, 1_500_000
_TEXT_CHARACTERS, _FIRST_CHARACTERS, _BRIEF_CHARACTERS = 24_000, 4_000, 200
# Characters that would end a script element, and line ends in old JavaScript.
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class PromptList:
    """Prompts of a page.

    Args:
        data: JSON for the script, safe inside an element.
        counts: number of prompts with each outcome, over all prompts.
        first: first disagreements, shown without a script.
        brief: number of prompts without their thoughts.
        missing: number of prompts that are left out.
    """

    data: Markup
    counts: Mapping[str, int]
    first: Sequence[AnswerPair]
    brief: int
    missing: int


class _Side(TypedDict):
    """A model's answer, as the page's script reads it; without thoughts, it lacks both texts."""

    tokens: int
    answered: int
    state: str
    end: str
    loop: int
    right: bool
    found: str | None
    thinking: NotRequired[str]
    answer: NotRequired[str]


class _Entry(TypedDict):
    """A prompt, as the page's script reads it."""

    prompt: int
    sample: int
    task: str
    outcome: str
    question: str
    gold: str
    shared: int
    dense: _Side
    pruned: _Side


def list_prompts(pairs: Sequence[AnswerPair]) -> PromptList:
    """Return the prompts that fit on a page, those on which the models disagree first."""
    in_order = sorted(pairs, key=lambda pair: OUTCOMES.index(pair.outcome))
    entries = []
    brief = 0
    remaining_bytes, remaining_brief_bytes = _TEXT_BYTES, _BRIEF_BYTES

    # Two budgets: full entries until theirs is spent, then brief ones until theirs is.
    for pair in in_order:
        if remaining_bytes > 0:
            entry = _write(_describe(pair, _TEXT_CHARACTERS, with_thinking=True))
            remaining_bytes -= len(entry.encode())
        else:
            entry = _write(_describe(pair, _BRIEF_CHARACTERS, with_thinking=False))
            remaining_brief_bytes -= len(entry.encode())
            if remaining_brief_bytes < 0:
                break
            brief += 1
        entries.append(entry)

    return PromptList(
        data=Markup(f"[{','.join(entries)}]"),
        counts=Counter(pair.outcome for pair in pairs),
        first=[pair for pair in in_order if pair.outcome in ("lost", "won")][:MAX_STATIC_PROMPTS],
        brief=brief,
        missing=len(pairs) - len(entries),
    )


def truncate(text: str, max_characters: int = _FIRST_CHARACTERS) -> str:
    """Return printable text up to a length, with a note on the omitted characters."""
    text = replace_unprintable(text)
    more = len(text) - max_characters
    return (
        text
        if more <= 0
        else f"{text[:max_characters]}\n… {more:,} more characters in records.jsonl"
    )


def count_shared_characters(pair: AnswerPair, max_characters: int = _FIRST_CHARACTERS) -> int:
    """Return the length of the common beginning of both thoughts, up to the end of a word."""
    dense = truncate(pair.dense.thinking_text, max_characters)
    pruned = truncate(pair.pruned.thinking_text, max_characters)
    if dense == pruned:
        return len(dense)

    length = min(len(dense), len(pruned))
    differing = (index for index in range(length) if dense[index] != pruned[index])
    prefix = dense[: next(differing, length)]
    return max(prefix.rfind(" "), prefix.rfind("\n")) + 1


def _describe(pair: AnswerPair, max_characters: int, with_thinking: bool) -> _Entry:
    """Return a prompt as the entry that the script reads."""
    shared = 0
    if with_thinking:
        # The script counts in units of UTF-16.
        prefix = truncate(pair.dense.thinking_text, max_characters)[
            : count_shared_characters(pair, max_characters)
        ]
        shared = len(prefix.encode("utf-16-le")) // 2

    return {
        "prompt": pair.dense.prompt,
        "sample": pair.dense.sample,
        "task": truncate(pair.dense.task, _BRIEF_CHARACTERS),
        "outcome": pair.outcome,
        "question": truncate(pair.dense.question, max_characters),
        "gold": truncate(pair.dense.gold, max_characters),
        "shared": shared,
        "dense": _describe_side(pair.dense, max_characters, with_thinking),
        "pruned": _describe_side(pair.pruned, max_characters, with_thinking),
    }


def _describe_side(record: AnswerRecord, max_characters: int, with_thinking: bool) -> _Side:
    """Return one model's answer; without thoughts, only its figures and its scored answer."""
    extracted = record.extracted
    side: _Side = {
        "tokens": record.thinking_tokens,
        "answered": record.answer_tokens,
        "state": record.state,
        "end": record.finish_reason,
        "loop": record.loop_tokens,
        "right": record.correct,
        "found": None if extracted is None else truncate(extracted, _BRIEF_CHARACTERS),
    }

    if with_thinking:
        side["thinking"] = truncate(record.thinking_text, max_characters)
        side["answer"] = truncate(record.answer_text, max_characters)
    return side


def _write(entry: _Entry) -> str:
    text = json.dumps(entry, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_ESCAPES)
