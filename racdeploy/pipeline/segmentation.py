"""How two tokenizers cut the same texts: that of a model, and the same one with fewer tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import GateError
from racdeploy.runtime.template import PromptEncoder


@dataclass(frozen=True)
class Segmentation:
    """Tokens of some texts in both vocabularies, those that are the same, and words."""

    before: int
    after: int
    same: int
    words: int

    def describe(self, what: str) -> str:
        """Return how much longer some texts got, as a sentence for the report."""
        words = max(1, self.words)
        before, after = self.before / words, self.after / words
        times = self.after / max(1, self.before)
        return (
            f"{what} {before:.3f} tokens a word in the dense vocabulary "
            f"and {after:.3f} in the cut one, {times:.4f} times as many; "
            "the length of a thought is in tokens of each model's own"
        )


def compare_segmentation(
    dense: PromptEncoder, cut: PromptEncoder, old_ids: NDArray[np.int64], texts: Iterable[str]
) -> Segmentation:
    """Cut texts into tokens in both vocabularies; both must give the same text back.

    Args:
        old_ids: the dense id of each token of the cut vocabulary.

    Raises:
        GateError: the cut tokenizer does not give a text back as the dense one does.
    """
    before = after = same = words = 0

    for text in texts:
        dense_ids = dense.encode_text(text)
        cut_ids = cut.encode_text(text)
        found = cut.decode(cut_ids)
        if found != dense.decode(dense_ids):
            raise GateError(
                "text-not-restored",
                f"the cut vocabulary gives {text[:60]!r} back as {found[:60]!r}",
                remedy="report the tokenizer; leave vocabulary out of structure.keep until then",
            )

        dense_tokens = set(zip(_find_stops(dense, dense_ids), dense_ids, strict=True))
        renumbered = old_ids[cut_ids].tolist()
        cut_tokens = set(zip(_find_stops(cut, cut_ids), renumbered, strict=True))

        before += len(dense_ids)
        after += len(cut_ids)
        same += len(dense_tokens & cut_tokens)
        words += len(text.split())

    return Segmentation(before, after, same, words)


def _find_stops(encoder: PromptEncoder, ids: list[int]) -> list[int]:
    """Return the byte at which each token stops: byte-level tokens have a letter for each."""
    tokens = encoder.tokenizer.ids_to_tokens(ids)
    return list(accumulate(map(len, tokens)))
