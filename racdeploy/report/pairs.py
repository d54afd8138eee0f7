"""Pairs of a dense and a pruned answer to the same prompt, and their outcomes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from racdeploy.results.answers import AnswerRecord

Outcome = Literal["lost", "won", "wrong", "right"]
OUTCOMES: tuple[Outcome, ...] = ("lost", "won", "wrong", "right")
"""Only dense was right, only pruned was, neither, both; the most interesting ones first."""
_QUANTILES = {"shortest": 0, "half are at most": 0.5, "nine of ten are at most": 0.9, "longest": 1}


@dataclass(frozen=True)
class AnswerPair:
    """Records of both models for one prompt and sample."""

    dense: AnswerRecord
    pruned: AnswerRecord

    @property
    def outcome(self) -> Outcome:
        """``lost`` or ``won`` by pruning, or the same for both models."""
        if self.dense.correct == self.pruned.correct:
            return "right" if self.dense.correct else "wrong"
        return "lost" if self.dense.correct else "won"


def pair_records(records: Sequence[AnswerRecord]) -> list[AnswerPair]:
    """Match the records of the arms dense and pruned by prompt and sample, in prompt order."""
    records_by_arm: dict[str, dict[tuple[int, int], AnswerRecord]] = {"dense": {}, "pruned": {}}
    for record in records:
        if record.arm in records_by_arm:
            records_by_arm[record.arm][record.prompt, record.sample] = record

    dense, pruned = records_by_arm["dense"], records_by_arm["pruned"]
    return [AnswerPair(dense[key], pruned[key]) for key in sorted(dense.keys() & pruned.keys())]


def list_thinking_lengths(pairs: Sequence[AnswerPair]) -> tuple[list[int], list[int]]:
    """Return the thinking lengths of dense and of pruned, one for each prompt."""
    dense = [pair.dense.thinking_tokens for pair in pairs]
    pruned = [pair.pruned.thinking_tokens for pair in pairs]
    return dense, pruned


def length_quantiles(pairs: Sequence[AnswerPair]) -> list[tuple[str, int, int]]:
    """Return the quantiles of the thinking lengths: name, dense and pruned."""
    if not pairs:
        return []

    dense, pruned = map(sorted, list_thinking_lengths(pairs))

    quantiles = []
    for name, share in _QUANTILES.items():
        index = max(math.ceil(share * len(pairs)) - 1, 0)
        quantiles.append((name, dense[index], pruned[index]))

    return quantiles
