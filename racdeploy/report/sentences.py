"""Kinds of sentences in the thinking, and how often each model says them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from racdeploy.results.answers import HESITATION_WORDS

_LOOKED_AT = 400  # characters of a sentence: patterns take the square of its length
_END = re.compile(r"[.!?](?=\s|$)|\n")
_PATTERNS = {
    "check": r".*\b(check|verif|confirm|make sure)",
    "start again": r".*\b(start|begin|try)\b.*\b(again|over)\b",
    **{f"begin with {word}": rf"\W*{word.casefold()}\b" for word in HESITATION_WORDS},
}


def count_sentences(thoughts: Iterable[str]) -> Counter[str]:
    """Return the number of sentences by kind; one may be of several kinds, or of none."""
    counts: Counter[str] = Counter()
    for thought in thoughts:
        parts = map(str.split, _END.split(thought.casefold()))
        sentences = [" ".join(words)[:_LOOKED_AT] for words in parts if words]

        counts["all"] += len(sentences)
        counts["repeat an earlier one"] += len(sentences) - len(set(sentences))
        for kind, pattern in _PATTERNS.items():
            counts[kind] += sum(bool(re.match(pattern, sentence)) for sentence in sentences)
    return counts
