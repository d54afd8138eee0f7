"""Dense and pruned on the same prompt: who was right, who thought longer, and what was lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from racdeploy.results.answers import Record

Outcome = Literal["lost", "won", "wrong", "right"]
OUTCOMES: tuple[Outcome, ...] = ("lost", "won", "wrong", "right")
"""Only dense was right, only pruned was, neither, both; those to read first come first."""
_QUANTILES = {"shortest": 0, "half are at most": 0.5, "nine of ten are at most": 0.9, "longest": 1}


@dataclass(frozen=True)
class Pair:
    """Both models on one prompt and sample."""

    dense: Record
    pruned: Record

    @property
    def outcome(self) -> Outcome:
        if self.dense.correct == self.pruned.correct:
            return "right" if self.dense.correct else "wrong"
        return "lost" if self.dense.correct else "won"


def pair_records(records: Sequence[Record]) -> list[Pair]:
    """Match the records of the arms dense and pruned by prompt and sample, in prompt order."""
    by_arm: dict[str, dict[tuple[int, int], Record]] = {"dense": {}, "pruned": {}}
    for record in records:
        if record.arm in by_arm:
            by_arm[record.arm][record.prompt, record.sample] = record

    dense, pruned = by_arm["dense"], by_arm["pruned"]
    return [Pair(dense[key], pruned[key]) for key in sorted(dense.keys() & pruned.keys())]


def list_lengths(pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """Return the thinking lengths of dense and of pruned, prompt by prompt."""
    dense = [pair.dense.thinking_tokens for pair in pairs]
    pruned = [pair.pruned.thinking_tokens for pair in pairs]
    return dense, pruned


def length_quantiles(pairs: Sequence[Pair]) -> list[tuple[str, int, int]]:
    """Return name, dense and pruned value of the thinking lengths' quantiles."""
    if not pairs:
        return []

    dense, pruned = map(sorted, list_lengths(pairs))

    found = []
    for name, share in _QUANTILES.items():
        place = max(math.ceil(share * len(pairs)) - 1, 0)
        found.append((name, dense[place], pruned[place]))

    return found
